#!/usr/bin/env bash
# Submit the whole path as a chain of jobs: prepare -> train -> evaluate -> report. Each job waits for the one before it
# to succeed; if one fails, Slurm cancels those behind it.
#   slurm/submit.sh [--dry-run] [prepare] [balance] [train] [evaluate]        default: all but balance
# With balance the data are embedded and clustered after prepare, and train reads rare pictures more often (docs/balance.md).
# Settings: env.sh. --dry-run submits nothing; it prints the commands, and Slurm says whether it would take them.
set -euo pipefail
PROJECT=${PROJECT:-$(cd "$(dirname "$0")/.." && pwd)}
set -a # jobs inherit the settings
source "$PROJECT/slurm/env.sh"
set +a

dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run=yes
    shift
fi
[ $# -gt 0 ] || set -- prepare train evaluate
for stage in "$@"; do
    if [[ ! $stage =~ ^(prepare|balance|train|evaluate)$ ]]; then
        echo "error: unknown stage '$stage': slurm/submit.sh [--dry-run] [prepare] [balance] [train] [evaluate]" >&2
        exit 2
    fi
done
stages=" $* "
wants() { [[ $stages == *" $1 "* ]]; }
if wants evaluate && [ -z "$EVALUATION_SETS" ]; then
    echo "error: nothing to evaluate: set EVALUATION_SETS, or name the stages: slurm/submit.sh prepare train" >&2
    exit 2
fi
if wants balance; then
    if [ -z "$EMBEDDER" ]; then
        echo "error: nothing to embed with: set EMBEDDER to a run, or to a model of open_clip or transformers" >&2
        exit 2
    fi
    OPTIONS="${OPTIONS:+$OPTIONS }data.balance=$BALANCE/rates"
fi

# submit NAME OPTION… FILE: one job, behind the one submitted before it
jobs=()
submit() {
    local name=$1 job
    shift
    local command=(sbatch --parsable --job-name="$name" --output="$LOGS/%x-%j.log")
    if [ ${#jobs[@]} -gt 0 ]; then
        command+=(--dependency="afterok:${jobs[-1]}" --kill-on-invalid-dep=yes)
    fi
    if [ -n "$dry_run" ]; then
        echo "${STAGE:+STAGE=$STAGE }${OPTIONS:+OPTIONS=\"$OPTIONS\" }${command[*]} $*"
        sbatch --test-only "$@"
        job="<$name>"
    else
        job=$("${command[@]}" "$@")
        job=${job%%;*} # in a federation the cluster's name follows
        printf '%-9s %s\n' "$name" "$job"
    fi
    jobs+=("$job")
}
# submit_array NAME TASKS OPTION… FILE: the same, each task with a log of its own
submit_array() {
    local name=$1 tasks=$2
    shift 2
    submit "$name" --array="0-$((tasks - 1))" --output="$LOGS/%x-%A_%a.log" "$@"
}
take_back() {
    local code=$?
    if [ "$code" -ne 0 ] && [ -z "$dry_run" ] && [ ${#jobs[@]} -gt 0 ]; then
        scancel "${jobs[@]}"
        echo "error: a job was refused; those before it are cancelled" >&2
    fi
}
trap take_back EXIT

mkdir -p "$LOGS"
# shellcheck disable=SC2086  # the settings hold several options
{
    if wants prepare; then
        if [ "$DOWNLOAD_TASKS" -gt 0 ]; then
            STAGE=ingest submit ingest $PREPARE_SBATCH slurm/prepare.sbatch
            STAGE=download submit_array download "$DOWNLOAD_TASKS" $PREPARE_SBATCH slurm/prepare.sbatch
        fi
        submit prepare $PREPARE_SBATCH slurm/prepare.sbatch
    fi
    if wants balance; then
        submit_array embed "$EMBED_TASKS" $EVALUATE_SBATCH slurm/embed.sbatch
        submit clusters $PREPARE_SBATCH slurm/clusters.sbatch
        submit balance $PREPARE_SBATCH slurm/balance.sbatch
    fi
    if wants train; then
        submit train $TRAIN_SBATCH slurm/train.sbatch
    fi
    if wants evaluate; then
        submit_array evaluate "$EVALUATION_TASKS" $EVALUATE_SBATCH slurm/evaluate.sbatch
        submit collect $PREPARE_SBATCH slurm/collect.sbatch
    fi
}
if [ -z "$dry_run" ]; then
    list=$(IFS=, && echo "${jobs[*]}")
    echo "watch:    squeue --jobs=$list; tail -F $LOGS/*.log"
    echo "cancel:   scancel ${jobs[*]}"
fi

# shellcheck shell=bash
# When a training job is queued again, and when it has been often enough; read by train.sbatch.
#
#   exit code of training     then
#   0, 2                      finished; a mistake in the input: the job ends with that code
#   75                        stopped as asked, and saved: again
#   any other, a signal       again if there is a new checkpoint since this start, or if Slurm had asked it to stop
#
# Never more than MAX_RESTARTS times, nor after MAX_STARTS_WITHOUT_PROGRESS starts in a row, whoever queued them, that
# began at the same checkpoint. Each start is a line of RUN/starts.tsv: time, job, restart, checkpoint.

newest_checkpoint() {
    cat "$RUN/checkpoints/latest" 2>/dev/null || echo none
}

# Count this start; end the job if the last ones came to nothing.
begin_start() {
    checkpoint_at_start=$(newest_checkpoint)
    mkdir -p "$RUN"
    touch "$RUN/starts.tsv"
    local in_vain
    in_vain=$(awk -F '\t' -v job="$SLURM_JOB_ID" -v now="$checkpoint_at_start" \
        '$2 == job { count = ($4 == now) ? count + 1 : 0 } END { print count + 0 }' "$RUN/starts.tsv")
    if [ "$in_vain" -ge "$MAX_STARTS_WITHOUT_PROGRESS" ]; then
        echo "error: $in_vain starts in a row made no new checkpoint ($RUN/starts.tsv): see this log for why;" \
            "save more often (train.save_every_steps) or take a longer time limit, then submit again" >&2
        exit 1
    fi
    printf '%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" \
        "$checkpoint_at_start" >>"$RUN/starts.tsv"
}

# end_start CODE WAS_ASKED: queue the job again or not, and end it with the code.
end_start() {
    local code=$1 was_asked=$2
    if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
        exit "$code"
    elif [ "$code" -ne 75 ] && [ -z "$was_asked" ] && [ "$(newest_checkpoint)" = "$checkpoint_at_start" ]; then
        echo "error: training ended with $code before its first new checkpoint: not queued again" >&2
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
        echo "error: training ended with $code after MAX_RESTARTS=$MAX_RESTARTS restarts: not queued again" >&2
    else
        echo "training ended with $code at $(newest_checkpoint): queued again"
        scontrol requeue "$SLURM_JOB_ID" || echo "error: Slurm does not queue it again: submit it again" >&2
    fi
    exit "$code"
}

# shellcheck shell=bash
# Settings of your cluster and of one run, read by submit.sh and by every job. Change them here, or export them before.
# All paths are on a file system that every node sees.

# The checkout (if not exported: where sbatch was called), its environment, and where jobs write their logs.
PROJECT=${PROJECT:-${SLURM_SUBMIT_DIR:-$PWD}}
VENV=${VENV:-$PROJECT/.venv}
LOGS=${LOGS:-$PROJECT/logs}

# Options of sbatch for each kind of job: partition, account, nodes, time. They win over the #SBATCH lines.
PREPARE_SBATCH=${PREPARE_SBATCH:-}
TRAIN_SBATCH=${TRAIN_SBATCH:-}
EVALUATE_SBATCH=${EVALUATE_SBATCH:-}

# Preparation: a build file; how many tasks share its download (0: one job does all); one stage alone, if not all.
CONFIG=${CONFIG:-$PROJECT/examples/cc12m.yaml}
DOWNLOAD_TASKS=${DOWNLOAD_TASKS:-8}
STAGE=${STAGE:-}

# Training: data, recipe, further section.key=value options, the run directory; restarts.sh explains the two limits.
SHARDS=${SHARDS:-$PROJECT/data/cc12m/shards}
TOKENIZER=${TOKENIZER:-$PROJECT/data/cc12m/tokenizer.model}
RECIPE=${RECIPE:-base}
OPTIONS=${OPTIONS:-}
RUN=${RUN:-$PROJECT/runs/$RECIPE}
MAX_RESTARTS=${MAX_RESTARTS:-100}
MAX_STARTS_WITHOUT_PROGRESS=${MAX_STARTS_WITHOUT_PROGRESS:-5}

# Balanced data (the stage `balance`): the model that embeds, how many tasks share it, how many clusters and how near they
# are merged, what large ones are thinned to, the share of samples to keep, where all of it goes.
EMBEDDER=${EMBEDDER:-}
EMBED_TASKS=${EMBED_TASKS:-8}
CLUSTERS=${CLUSTERS:-50000}
MERGE_SIMILARITY=${MERGE_SIMILARITY:-0.7}
BALANCE_ALPHA=${BALANCE_ALPHA:-0.2}
BALANCE_KEEP=${BALANCE_KEEP:-0.5}
BALANCE=${BALANCE:-$SHARDS-balance}

# Evaluation: sets in CLIP_benchmark's layout, separated by spaces, and how many tasks share each of them.
EVALUATION_SETS=${EVALUATION_SETS:-}
EVALUATION_TASKS=${EVALUATION_TASKS:-4}

export PATH="$VENV/bin:$PATH"
cd "$PROJECT" || exit

# Rendezvous of all ranks: the first node, and a port that no other job of yours on it shares.
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export MASTER_ADDR MASTER_PORT
fi

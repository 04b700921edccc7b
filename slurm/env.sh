# Settings of your cluster, read by every sbatch file here. Change them in this file, or export them before sbatch.

# The checkout (jobs start where sbatch was called) and its environment.
PROJECT=${PROJECT:-$SLURM_SUBMIT_DIR}
VENV=${VENV:-$PROJECT/.venv}

# What the stages read and write: a file system that all nodes see.
SHARDS=${SHARDS:-$PROJECT/data/cc12m/shards}
TOKENIZER=${TOKENIZER:-$PROJECT/data/cc12m/tokenizer.model}
RUN=${RUN:-$PROJECT/runs/$SLURM_JOB_NAME}
EVALUATION_SETS=${EVALUATION_SETS:-}

# Preparation: a build file (its `output` gets shards/ and tokenizer.model), and the one stage to run, if not all.
CONFIG=${CONFIG:-$PROJECT/examples/cc12m.yaml}
STAGE=${STAGE:-}

# Training: a recipe and further section.key=value options.
RECIPE=${RECIPE:-base}
OPTIONS=${OPTIONS:-}

export PATH="$VENV/bin:$PATH"
cd "$PROJECT"

# Rendezvous of all ranks: the first node, and a port that no other job of yours on it shares.
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export MASTER_ADDR MASTER_PORT
fi

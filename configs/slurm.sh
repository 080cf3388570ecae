#!/bin/bash
# The 7B run on some nodes of 8 GPUs: sbatch --nodes 4 configs/slurm.sh [--section.key value ...]
# Paths are drawn by vLLM (pip install 'vpgea_fast[vllm]' on every node); without it add --engine hf --rollout.max_batch 64.
#
# When a worker dies torchrun starts all of them again (--max-restarts), when a node fails Slurm starts the job again
# (--requeue); --resume-if-started then goes on from the newest complete checkpoint in RUN, which all nodes must see.
# Before the time of the allocation is over the run saves itself and stops, and the job queues again.
#SBATCH --job-name vpgea-7b
#SBATCH --nodes 2
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --time 24:00:00
#SBATCH --requeue
#SBATCH --open-mode append

set -u
RUN=${RUN:-runs/7b-multinode}
CONFIG=${CONFIG:-7b-multinode}  # a file, or the name of one that is installed with the project
MINUTES=${MINUTES:-1400}  # of the 1440 above: the rest is for the last step and its save

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --max-restarts 3 --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head_node:29500" \
    -m vpgea_fast.cli train "$CONFIG" --resume-if-started \
    --run.dir "$RUN" --run.max_minutes "$MINUTES" --parallel.replicas "$SLURM_NNODES" "$@"
status=$?

# A stopped run ends with 0 like a finished one; only a finished one has its report.
if [ "$status" -eq 0 ] && [ ! -e "$RUN/report.html" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/bin/sh
# A pretraining job under Slurm: one task on each node, which starts the ranks of its node. Submit from the project's
# folder, on a file system that all nodes share:
#
#   CONFIG=examples/pretrain_gpt/llama-13b.yaml DATA_PATH=data/corpus_text_document sbatch examples/slurm/pretrain.sh
#
# Change the lines below for your cluster. Five minutes before the end of its time the job gets a SIGTERM, saves and
# leaves; submitted again (or requeued) it continues.
#SBATCH --job-name=pretrain
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=pretrain-%j.log
set -eu

cd "${SLURM_SUBMIT_DIR:-.}"
NNODES=$SLURM_JOB_NUM_NODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # another one for each job that may share the node
SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-280}     # saving may take the five minutes
export NNODES MASTER_ADDR MASTER_PORT SHUTDOWN_TIMEOUT

# shellcheck disable=SC2016 # each task puts in its own number
exec srun --kill-on-bad-exit=1 sh -c 'NODE_RANK=$SLURM_NODEID exec sh run_pretrain_gpt.sh "$@"' sh "$@"

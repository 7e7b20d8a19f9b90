#!/bin/bash
#SBATCH --nodes=4 --ntasks-per-node=8 --gpus-per-task=1 --cpus-per-task=8 --time=24:00:00
#SBATCH --signal=TERM@120   # two minutes before the end: save and stop
#SBATCH --requeue            # after a node's failure or preemption
srun python -m train run --distributed --out $SCRATCH/runs/resnet50 \
  --dataset imagenet2012 --data-dir $SCRATCH/tfds --network resnet50 --k 32 --b 16
[ $? = 75 ] && scontrol requeue $SLURM_JOB_ID   # stopped by the time limit: go on in a new job

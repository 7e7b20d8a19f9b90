#!/bin/sh
# One process per host of a TPU pod; nothing has to be named.
gcloud compute tpus tpu-vm create bilevel --zone ZONE --accelerator-type v5litepod-16 --version v2-alpha-tpuv5-lite
gcloud compute tpus tpu-vm ssh bilevel --zone ZONE --worker all --command "
  { [ -d code ] || git clone REPOSITORY code; } && cd code && pip install --user uv &&
  ~/.local/bin/uv venv --allow-existing --python 3.11 && . .venv/bin/activate &&
  ~/.local/bin/uv pip install -e '.[train]' 'jax[tpu]' &&
  python -m train run --distributed --out /mnt/shared/runs/resnet50 \
    --dataset imagenet2012 --data-dir /mnt/shared/tfds --network resnet50 --k 16 --b 16"

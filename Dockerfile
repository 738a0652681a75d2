# All three tasks with the tested versions. Torch can use GPUs (docker run --gpus all); the
# operators of mmcv are compiled for the CPU.
#   docker build -t mmhrformer . && docker run --rm mmhrformer env
#   docker run --rm -v "$PWD:/runs" -w /runs mmhrformer train my_config.py
FROM python:3.11-bookworm

RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /mmhrformer
COPY . .
RUN make env PYTHON=python && rm -rf ~/.cache

ENTRYPOINT ["/mmhrformer/.venv/bin/python", "-m", "mmhrformer"]
CMD ["--help"]

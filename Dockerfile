# Two images of dinoreg, from a checkout; docs/quickstart.md has how they are run.
#
#   docker build --target cpu  -t dinoreg:cpu .
#   docker build --target cuda -t dinoreg:cuda .
#
# PyTorch's usual wheels bring CUDA's libraries (12.8), so that a plain Python image serves both. For a much smaller image
# without them give PyTorch's own index of CPU wheels to the first: --build-arg TORCH_INDEX=URL.
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:3.12-slim AS base
COPY --from=wheel /wheels /wheels
ENV HOME=/tmp PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["dinoreg"]
CMD ["doctor"]

FROM base AS cpu
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$(ls /wheels/*.whl)[all]"

FROM base AS cuda
# The compiler is for model.compile=true. The host has the driver (570 or later) and NVIDIA's container toolkit.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir "$(ls /wheels/*.whl)[all]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# A learner: torch, and the actor's package, which describes worlds and evaluates policies. From the top of the repository:
#   docker build -f docker/learner.Dockerfile -t rustyrl-learner .
# PyPI's torch brings its own CUDA libraries, so a base of nvidia/cuda would hold them twice. The host provides the driver and
# the NVIDIA Container Toolkit. Another base needs what actor.Dockerfile says.
ARG BASE_IMAGE=python:3.11-slim-bookworm
# Has a C compiler, for rustyrl/c; from a base without one the image works, and computes networks more slowly.
ARG BUILD_IMAGE=python:3.11-bookworm

FROM ${BUILD_IMAGE} AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${BASE_IMAGE}
# The actors run as the same user id: the link is a socket that only its owner may use.
RUN useradd --uid 1000 --create-home rustyrl && install -d -o rustyrl /link /rustyrl/runs
# Gigabytes, in a layer that stays when the source changes.
COPY constraints.txt /install/
RUN pip install --no-cache-dir -c /install/constraints.txt torch
COPY --from=build /wheel /install
RUN pip install --no-cache-dir -c /install/constraints.txt "$(echo /install/*.whl)[learner]"
COPY docker/start-learner.sh /usr/local/bin/start-learner
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /rustyrl
ENTRYPOINT ["start-learner"]
CMD ["drone"]

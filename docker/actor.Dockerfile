# An actor: the base install, no torch. From the top of the repository:
#   docker build -f docker/actor.Dockerfile -t rustyrl-actor .
# Another base needs Python (constraints.txt is resolved for 3.11) with pip, installing into /usr/local, and useradd.
ARG BASE_IMAGE=python:3.11-slim-bookworm
# Has a C compiler, for rustyrl/c; from a base without one the image works, and computes networks more slowly.
ARG BUILD_IMAGE=python:3.11-bookworm

FROM ${BUILD_IMAGE} AS build
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir --prefix=/install -c constraints.txt .

FROM ${BASE_IMAGE}
# The learner runs as the same user id: the link is a socket that only its owner may use.
RUN useradd --uid 1000 --create-home rustyrl && install -d -o rustyrl /link
COPY --from=build /install /usr/local
USER 1000
WORKDIR /rustyrl
ENTRYPOINT ["rustyrl", "actor"]
CMD ["--join", "ipc:///link/learner"]

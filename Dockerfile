# The image that Kamal runs; docs/getting-started.md says how to build and push it.
#
#   make docker                        builds kamal-proxy:v<version>
#   make docker BASE=debian:bookworm-slim
#
# Any Debian or Ubuntu with Python 3.11 or later will do as a base.
ARG BASE=debian:trixie-slim

# --- build: wheels of the proxy and of all it needs, in a virtual environment without pip ---------
FROM ${BASE} AS build

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      ca-certificates gcc libc6-dev python3-dev python3-venv

WORKDIR /build
RUN python3 -m venv pip \
 && python3 -m venv --without-pip /opt/kamal-proxy

COPY pyproject.toml README.md LICENSE ./
COPY kamal_proxy kamal_proxy
# Debug information would be four fifths of the extension.
RUN LDFLAGS=-Wl,--strip-debug pip/bin/pip wheel --no-cache-dir --wheel-dir wheels '.[http3]'

# Byte code is made now, since nobody can write it later, and not compared with the source's time.
RUN pip/bin/pip --python /opt/kamal-proxy/bin/python install \
      --no-index --find-links wheels --no-compile 'kamal-proxy[http3]' \
 && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/kamal-proxy/lib

# --- the image ------------------------------------------------------------------------------------
FROM ${BASE}

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      ca-certificates python3 \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/*

# Volumes that the Go proxy's image has left hold files of 1001.
RUN groupadd --gid 1001 kamal-proxy \
 && useradd --uid 1001 --gid 1001 --create-home kamal-proxy

COPY --from=build /opt/kamal-proxy /opt/kamal-proxy

# The log is written line by line, and `docker exec` gets no locale.
ENV PATH=/opt/kamal-proxy/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8 \
    PYTHONUTF8=1 \
    PYTHONUNBUFFERED=1

ARG VERSION
# `kamal proxy reboot` removes what has this title.
LABEL org.opencontainers.image.title=kamal-proxy \
      org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.licenses=MIT

USER kamal-proxy:kamal-proxy
WORKDIR /home/kamal-proxy
# A new volume takes the owner of the directory that it covers.
RUN mkdir -p .config/kamal-proxy

EXPOSE 80 443

# Not an entry point: Kamal says `kamal-proxy run ...` after the image's name.
CMD ["kamal-proxy", "run"]

# One image for the coordinator and for the sites; the compose file in a kit runs it.
#   docker build -t fedbags:0.1.0 .
FROM python:3.11-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends nginx-light \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY common common
COPY server server
COPY client client
COPY deploy deploy
RUN pip install --no-cache-dir uv==0.12.24 \
    && uv pip install --system --no-cache --constraint constraints.txt --build-constraint constraints.txt '.[dp,dicom]' \
    && rm -rf /src/*
WORKDIR /

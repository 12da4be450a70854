# Two images, each a target: `train` (cagsr train and everything before and after it) and `serve` (cagsr serve).
# TORCH_INDEX names a package index for torch; empty takes the usual one, whose Linux build brings CUDA. docs/production.md has the commands.
ARG PYTHON=3.12-slim-bookworm

FROM python:${PYTHON} AS build
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/cagsr/bin:$PATH
RUN python -m venv /opt/cagsr
WORKDIR /source
COPY constraints.txt ./
# Alone, because it is the large one and changes seldom.
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY src src

FROM build AS build-train
RUN pip install --constraint constraints.txt ".[pages,trl,nltk,gguf]"

FROM build AS build-serve
RUN pip install --constraint constraints.txt ".[serve]"

FROM python:${PYTHON} AS base
RUN useradd --create-home --uid 10001 cagsr && install --directory --owner=cagsr /data
ENV PATH=/opt/cagsr/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/data/.cache/huggingface
WORKDIR /data
USER 10001
ENTRYPOINT ["cagsr"]

FROM base AS serve
COPY --from=build-serve /opt/cagsr /opt/cagsr
CMD ["serve", "--help"]

FROM base AS train
COPY --from=build-train /opt/cagsr /opt/cagsr
CMD ["train", "--help"]

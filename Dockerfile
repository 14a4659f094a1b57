# The scoring server. Build: docker build -t moe-prefill .   Run: see compose.yaml
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# On machines with GPUs pip takes torch with CUDA; --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu for CPUs.
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple "torch>=2.11,<2.14" \
    && pip install --no-cache-dir ".[server]" \
    && useradd --create-home --uid 10001 scorer \
    && mkdir /data && chown scorer /data
USER scorer
ENV MOE_PREFILL_HOST=0.0.0.0 MOE_PREFILL_PORT=8000 MOE_PREFILL_DATA_DIR=/data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=15m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["moe-prefill"]
CMD ["serve"]

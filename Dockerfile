# The HTTP service on a CPU; docs/deploy.md shows how to build and run it. The build steps are those of README.
FROM python:3.11-slim

# PyPI's PyTorch for Linux brings gigabytes of CUDA. --build-arg TORCH_INDEX=URL takes it from another index first:
# that of the CPU builds is on PyTorch's page "Get started".
ARG TORCH_INDEX=""
# serve,export runs exported graphs (--experts onnx:DIR) as well.
ARG EXTRAS="serve"

WORKDIR /build
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision; fi
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY featdistill featdistill
RUN pip install --no-cache-dir ".[$EXTRAS]"

RUN useradd --create-home featdistill
USER featdistill
WORKDIR /home/featdistill
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# Others can reach it, so it does not start without a key in FEATDISTILL_API_KEY.
ENTRYPOINT ["python", "-m", "featdistill", "serve", "--host", "0.0.0.0", "--port", "8000"]

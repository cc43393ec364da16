# The image of every Python program: extproc, xds, usage, the mock backends and the router command.
#   docker build -t api-router:dev .
#   docker run --rm api-router:dev cli --help
# PYTHON_IMAGE can name a digest, or the same image on a registry of your own.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python3 -m venv /opt/router
# The dependencies change rarely, so they are a layer of their own.
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > requirements.txt \
 && /opt/router/bin/pip install -c constraints.txt -r requirements.txt
COPY . .
RUN /opt/router/bin/pip install --no-deps . \
 # The image has nothing that installs.
 && /opt/router/bin/pip uninstall --yes setuptools pip

FROM ${PYTHON_IMAGE} AS runtime
# The same user as Envoy's in docker-compose.yml: they share the unix sockets in RUN_DIR.
RUN groupadd --gid 10001 router \
 && useradd --uid 10001 --gid router --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin router \
 && install -d -o router -g router -m 0770 /run/router /var/lib/router
COPY --from=builder /opt/router /opt/router
COPY deploy/healthcheck.py /usr/local/lib/router/healthcheck.py
ENV PATH=/opt/router/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    POLICY_DIR=/etc/router/policies \
    RUN_DIR=/run/router \
    STATE_DIR=/var/lib/router
USER 10001:10001
WORKDIR /run/router
# Exec form: the program is process 1 and gets the signals that stop and drain it.
ENTRYPOINT ["python", "-m"]
CMD ["extproc"]

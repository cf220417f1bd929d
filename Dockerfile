# gp-jax serve in a container.
#
#   docker build -t gp-jax .                                  for a CPU
#   docker build -t gp-jax-tpu --build-arg EXTRAS=serve,tpu . for a TPU VM: run it with --privileged --net=host --user root
#
#   docker run -p 8000:8000 -v gp-jax:/home/gp_jax/.cache gp-jax scenes
#
# The volume keeps compiled programs and models of the Hub: a second start reads them.

FROM python:3.12-slim AS build
WORKDIR /build
COPY pyproject.toml hatch_build.py README.md LICENSE requirements-dev.lock ./
COPY gp_jax gp_jax
COPY configs configs
# The versions that were tested. The TPU's are the lock's too.
ARG EXTRAS=serve
RUN python -m venv /opt/gp_jax \
    && /opt/gp_jax/bin/python -m pip install --no-cache-dir --constraint requirements-dev.lock --build-constraint requirements-dev.lock \
       ".[${EXTRAS}]"

FROM python:3.12-slim
COPY --from=build /opt/gp_jax /opt/gp_jax
ENV PATH=/opt/gp_jax/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --create-home gp_jax && install -d -o gp_jax -g gp_jax /home/gp_jax/.cache
USER gp_jax
VOLUME /home/gp_jax/.cache
EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=15m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=5)"]
# SIGTERM ends it when running answers are finished (--drain): give `docker stop` as long, with --time.
ENTRYPOINT ["gp-jax", "serve", "--host", "0.0.0.0"]
CMD ["scenes"]

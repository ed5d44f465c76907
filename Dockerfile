# Any image with Python 3.9 or newer does as a base. This one has no shell, no package manager and
# nothing else to run; pin it by digest where builds must repeat.
ARG BASE=gcr.io/distroless/python3-debian12
FROM ${BASE}

# The file is the whole program; it needs nothing but the standard library.
COPY dockeragent.py /dockeragent.py

# The root user: the engine's socket and the host's files belong to root. The README shows how to
# drop the capabilities that are not needed, and how to run as another user.
USER 0:0

# Documentation only: LISTEN_ADDR decides.
EXPOSE 3000

# Exec form: there is no shell. It asks /health, so it fails when the engine does not answer too.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10s --retries=3 \
    CMD ["/usr/bin/python3", "-I", "/dockeragent.py", "healthcheck"]

# Exec form: the agent is process 1 and gets SIGTERM itself. Requests in flight have 10 s then, so
# start it with a --stop-timeout of more.
ENTRYPOINT ["/usr/bin/python3", "-I", "/dockeragent.py"]

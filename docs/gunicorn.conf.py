"""gunicorn for a worker that serves its own metadata; every line may be changed.

DYN_SELF_HOST_METADATA=1 DYN_SYSTEM_ADVERTISE_URL=http://gpu7:8000 DYN_SYSTEM_SHARED_DIR=/dev/shm/selfhost \
    gunicorn -c gunicorn.conf.py wsgi:app
"""

import threading

bind = "0.0.0.0:8000"
workers = 4
worker_class = "gthread"  # a slow client holds a thread; in a sync worker it would hold the process
threads = 16
timeout = 60  # seconds; then a worker that shows no sign of life is killed
graceful_timeout = 30  # seconds that a download may still take when its worker is told to end
limit_request_line = 4094  # bytes; the longest URL of a file has 2,400
control_socket_disable = True  # or gunicorn 25 and later open one in the home directory


def post_worker_init(worker):
    """Register the model in each worker, and publish it or stand by to do so.

    What is raised here ends all of gunicorn: right at the first start, but a worker that replaces another can
    serve what the others registered.
    """
    import wsgi

    try:
        wsgi.attach()
    except Exception:
        if wsgi.registry.is_empty() and not worker.booted:
            raise
        worker.log.exception("cannot register the model; trying again in 10 seconds")
        again = threading.Timer(10, post_worker_init, [worker])
        again.daemon = True
        again.start()


def when_ready(server):
    """With --preload in the master too: what that has registered and published outlives every worker."""
    if server.cfg.preload_app:
        import wsgi

        wsgi.attach()

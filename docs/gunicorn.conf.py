"""gunicorn for a worker that serves its own metadata; every line may be changed.

DYN_SELF_HOST_METADATA=1 DYN_SYSTEM_ADVERTISE_URL=http://gpu7:8000 DYN_SYSTEM_SHARED_DIR=/dev/shm/selfhost \
    gunicorn -c gunicorn.conf.py wsgi:app
"""

bind = "0.0.0.0:8000"
workers = 4
worker_class = "gthread"  # a slow client holds a thread; in a sync worker it would hold the process
threads = 16
timeout = 60  # seconds; then a worker that shows no sign of life is killed
graceful_timeout = 30  # seconds that a download may still take when its worker is told to end
limit_request_line = 4094  # bytes; the longest URL of a file has 2,400


def post_worker_init(worker):
    """Register the model in each worker, and publish it or stand by to do so."""
    import wsgi

    wsgi.attach()


def when_ready(server):
    """With --preload in the master too: what that has registered and published outlives every worker."""
    if server.cfg.preload_app:
        import wsgi

        wsgi.attach()

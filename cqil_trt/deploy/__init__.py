"""Several replicas of the server, on a cluster.

server.py      one server, `mpirun … serve.py`, behind a Unix socket: start, readiness, end
ray_serve.py   the Ray Serve application: replicas and the gateway in front of them
routing.py     which replica a request goes to
exposition.py  the metrics of all replicas as one page
"""

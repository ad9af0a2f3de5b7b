"""Several replicas of the server, on a cluster.

ray_serve.py   the Ray Serve application, its arguments, and its replicas
server.py      the server of a replica, `mpirun … serve.py`: start, readiness, end
gateway.py     what clients talk to: passes requests on to servers, and answers back
routing.py     which replica a request goes to
exposition.py  the metrics of all replicas as one page
"""

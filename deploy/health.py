#!/usr/bin/env python3
"""The image's HEALTHCHECK: succeeds while /health answers 200."""

import http.client  # urllib would ask the proxy that HTTP_PROXY names
import os
import sys

port = int(os.environ.get("CQIL_PORT") or 8000)
connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
try:
    connection.request("GET", "/health")
    answer = connection.getresponse()
    sys.exit(None if answer.status == 200 else f"/health: {answer.status} {answer.read(1000).decode()}")
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"port {port}: {error}")

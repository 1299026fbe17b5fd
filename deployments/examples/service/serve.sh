#!/bin/sh
# Serve /www on $PORT until SIGTERM; busybox as process 1 needs the trap, or stopping takes the whole grace.
trap 'kill "$server"; exit 0' TERM INT
/bin/busybox httpd -f -p "$PORT" -h /www &
server=$!
wait "$server"

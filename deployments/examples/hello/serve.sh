#!/bin/sh
# Serve /www until SIGTERM; busybox as process 1 needs the trap, or stopping takes the whole grace.
trap 'kill "$server"; exit 0' TERM INT
/bin/busybox httpd -f -vv -p 8080 -h /www &
server=$!
wait "$server"

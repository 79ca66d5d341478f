#!/bin/sh
# Starts Redis with its configuration on standard input: no password stands on a command line or in the environment.
# The user spin has the commands and the keys of nbs/bridge/00_keys, bridge/01_streams and bridge/02_live, and nothing else.
set -eu
password=$(cat "${REDIS_PASSWORD_FILE:-/run/secrets/redis_password}")
: "${password:?The password of Redis is empty: run infra/make-secrets.sh.}"
hash=$(printf %s "$password" | sha256sum)
umask 077
exec redis-server - "$@" <<END
appendonly yes
maxmemory-policy noeviction
protected-mode no
user default off
user spin on #${hash%% *} resetkeys ~spin:* resetchannels &spin:* -@all \
+ping +info +eval +evalsha +get +set +del +expire +scan +publish +subscribe +unsubscribe \
+xadd +xdel +xlen +xrange +xrevrange +xread +xreadgroup +xack +xclaim +xautoclaim +xpending \
+xgroup|create +xgroup|delconsumer +xinfo|consumers
END

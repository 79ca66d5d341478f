#!/bin/sh
# The bucket, and a user who may use it and nothing else. Runs at each start; a changed policy or password takes effect then.
set -eu
secrets=${SECRETS_DIR:-/run/secrets}
password=$(cat "$secrets/minio_password")
MC_HOST_minio="http://$MINIO_ROOT_USER:$(cat "$secrets/minio_root_password")@minio:9000"
export MC_HOST_minio
mc mb --ignore-existing minio/spin
mc admin policy create minio spin /etc/minio-policy.json
printf 'spin\n%s\n' "$password" | mc admin user add minio
mc admin policy attach minio spin --user spin

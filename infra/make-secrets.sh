#!/bin/sh
# Makes the passwords that compose.yaml reads, in infra/secrets; run it again at will: what is there stays as it is.
# Only its owner may enter the folder. The files in it may be read by all, since Compose mounts them with the owner and the mode
# that they have here, and the processes in the containers are other users.
set -eu
cd "$(dirname "$0")"
mkdir -p -m 0700 secrets
chmod 0700 secrets
cd secrets
umask 0222

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
put() {
  [ -e "$1" ] && return
  printf '%s\n' "$2" > "$1.part"
  mv "$1.part" "$1"
}

for name in postgres_root_password postgres_password redis_password minio_root_password minio_password spin_token; do
  put "$name" "$(random)"
done
put spin_postgres_url "postgresql://spin:$(cat postgres_password)@postgres:5432/spin"
put spin_redis_url "redis://spin:$(cat redis_password)@redis:6379/0"
put spin_store_url "s3://spin:$(cat minio_password)@minio:9000/spin?secure=false"
put spin_llm_api_key ""  # of the language model in .env, if it wants one

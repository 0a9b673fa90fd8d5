#!/bin/bash
# Starts Vestibule the way Complement wants a homeserver: server name $SERVER_NAME, client API on
# $COMPLEMENT_IP:8008, federation (TLS) on $COMPLEMENT_IP:8448, and a certificate from the CA that
# Complement left in complement/ca.
#
# Everything is under $COMPLEMENT_ROOT. That path and the address change when a container is
# committed and another made from it, so the configuration is written anew at every start.
set -euo pipefail
: "${SERVER_NAME:?}" "${COMPLEMENT_IP:?}" "${COMPLEMENT_ROOT:?}"
binary=${VESTIBULE_BINARY:-${PROJECT:?}/target/release/vestibule}

cd "$COMPLEMENT_ROOT"
mkdir -p data conf

openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out conf/tls.key
openssl req -new -key conf/tls.key -subj "/CN=$SERVER_NAME" |
    openssl x509 -req -CA complement/ca/ca.crt -CAkey complement/ca/ca.key -days 7 \
        -set_serial "0x$(openssl rand -hex 8)" -out conf/tls.crt \
        -extfile <(printf 'subjectAltName=DNS:%s\n' "$SERVER_NAME") 2> /dev/null

cat /etc/ssl/certs/ca-certificates.crt complement/ca/ca.crt > conf/ca.crt
export SSL_CERT_FILE=$COMPLEMENT_ROOT/conf/ca.crt

appservices=
for file in complement/appservice/*.yaml; do
    [ ! -e "$file" ] || appservices+="\"$COMPLEMENT_ROOT/$file\", "
done

cat > conf/vestibule.toml <<END
[server]
name = "$SERVER_NAME"
public_base_url = "http://127.0.0.1:8008/"
signing_key_path = "$COMPLEMENT_ROOT/data/signing.key"
default_room_version = "11"

[database]
url = "sqlite:$COMPLEMENT_ROOT/data/vestibule.db"

[media]
path = "$COMPLEMENT_ROOT/data/media"

[client]
listen = ["$COMPLEMENT_IP:8008"]

[federation]
listen = ["$COMPLEMENT_IP:8448"]
tls_certificate = "$COMPLEMENT_ROOT/conf/tls.crt"
tls_private_key = "$COMPLEMENT_ROOT/conf/tls.key"
allow_ip_ranges = ["127.0.0.0/8"]
trusted_key_servers = []

[registration]
mode = "open"
shared_secret = "complement"

[appservices]
files = [$appservices]

[server_notices]
localpart = "_server"

[limits]
enabled = false

# Complement's servers fail a test on any request that they do not expect, so what goes beyond the
# handshake and the resync it knows is left out here; our own tests cover it.
[join]
race_send_join = false
ask_for_left_out = false
compare_donors = false
tell_missed_servers = false

[log]
level = "${VESTIBULE_LOG_LEVEL:-info}"
END

configs=(--config conf/vestibule.toml)
[ ! -e extra.toml ] || configs+=(--config extra.toml)
exec "$binary" serve "${configs[@]}"

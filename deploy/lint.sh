#!/usr/bin/env bash
# Checks the files of this folder: deploy/lint.sh FOLDER-WITH-TOOLS (make lint-deploy makes one). What the machine lacks is left out.
set -euo pipefail
cd "$(dirname "$0")"
tools=$1
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

has() {
    command -v "$1" >/dev/null || { echo "lint-deploy: $1 is not installed: its files are not checked" >&2; return 1; }
}

"$tools/hadolint" Dockerfile

if has kubectl; then
    for variant in cpu gpu; do
        kubectl kustomize "kubernetes/$variant" >"$work/$variant.yaml"
        "$tools/kubernetes-validate" --strict --quiet "$work/$variant.yaml"
    done
fi
"$tools/kubernetes-validate" --strict --quiet kubernetes/autoscaling.yaml

if has systemd-analyze; then
    # verify wants a program that exists
    sed 's#^ExecStart=[^ ]*#ExecStart=/bin/true#' pgfast.service >"$work/pgfast.service"
    systemd-analyze verify --man=no --recursive-errors=no "$work/pgfast.service"
    mkdir "$work/pgfast.service.d"
    cp pgfast-gpu.conf "$work/pgfast.service.d/"
    systemd-analyze verify --man=no --recursive-errors=no "$work/pgfast.service"
    # in tenths: 0 is a service that can do nothing, 100 one that can do everything
    systemd-analyze security --offline=true --threshold=15 --no-pager pgfast.service >"$work/security" || { cat "$work/security"; exit 1; }
fi

if has nginx; then
    openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=pgfast.example -keyout "$work/key" -out "$work/crt" 2>/dev/null
    sed "s#/etc/ssl/pgfast.example.crt#$work/crt#; s#/etc/ssl/private/pgfast.example.key#$work/key#" nginx.conf >"$work/site.conf"
    {
        echo "pid $work/pid; events {} http { access_log off;"
        for kind in client_body proxy fastcgi uwsgi scgi; do echo "${kind}_temp_path $work/$kind;"; done
        echo "include $work/site.conf; }"
    } >"$work/nginx.conf"
    nginx -t -q -e stderr -c "$work/nginx.conf" -p "$work"
fi
echo "lint-deploy: all good" >&2

#!/bin/sh
# Makes sure of what tests/cluster needs to make hosts of network namespaces. Installs it with apt-get where that is possible
# without asking, else prints the command; those tests then are skipped.
set -eu
missing=
command -v ip >/dev/null || missing="$missing iproute2"
command -v sshd >/dev/null || [ -x /usr/sbin/sshd ] || missing="$missing openssh-server"
command -v ssh >/dev/null || missing="$missing openssh-client"
[ -z "$missing" ] && exit 0
command="apt-get install -y --no-install-recommends$missing"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Missing for the tests on several hosts:$missing. Installing: $command"
  # An sshd of this machine's own is not wanted: were one started on installation, it would go on.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
    trap 'rm -f $policy' EXIT
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $command >/dev/null
else
  echo "Missing for the tests on several hosts:$missing. To have them, too:" >&2
  echo "  sudo $command" >&2
  exit 1
fi

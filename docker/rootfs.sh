#!/bin/sh
# rootfs.sh PACKAGE...   Debian packages unpacked into /rootfs, with what every image of Kennel has.
#
# Unpacked and not installed: the image has no shell, no package manager and no documentation, which makes
# it half as large and leaves an intruder little. Each package is named, none comes as another's dependency;
# the build's last step runs the service, which fails where a library is missing. Names and versions stay
# in var/lib/dpkg/status.d, where scanners look for them.
set -eu
mkdir -p /rootfs/var/lib/dpkg/status.d /rootfs/tmp /rootfs/etc/ssl/certs /debs
chmod 1777 /rootfs/tmp
cd /debs
apt-get -o APT::Sandbox::User=root download base-files libc6 libgcc-s1 libstdc++6 \
  python3.11-minimal libpython3.11-minimal libpython3.11-stdlib \
  libbz2-1.0 libexpat1 libffi8 liblzma5 libssl3 libuuid1 zlib1g "$@"
for deb in *.deb; do
  dpkg-deb --extract "$deb" /rootfs
  dpkg-deb --field "$deb" >"/rootfs/var/lib/dpkg/status.d/$(dpkg-deb --field "$deb" Package)"
done
cd /rootfs
cp /etc/ssl/certs/ca-certificates.crt etc/ssl/certs/
echo 'root:x:0:0::/:/nonexistent
kennel:x:10001:10001::/tmp:/nonexistent' >etc/passwd
echo 'root:x:0:
kennel:x:10001:' >etc/group
rm -rf usr/share/doc usr/share/man usr/share/lintian usr/share/locale usr/share/gcc usr/share/gdb
# Not run here: other encodings of the C library (a service speaks UTF-8), Python's own test and build parts.
rm -rf usr/lib/x86_64-linux-gnu/gconv usr/lib/python3.11/lib2to3 usr/lib/python3.11/ensurepip usr/lib/python3.11/idlelib

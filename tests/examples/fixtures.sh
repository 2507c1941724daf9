# The files that examples of the documentation name, made once in the current directory.
set -e
export PATH=/usr/bin:/usr/sbin:/bin:/sbin:$PATH
truncate -s 16M small.img
mkfs.ext4 -q small.img
truncate -s 1G disk.img
sfdisk -q disk.img <<<$'start=2048, size=204800, type=83\nstart=206848, size=204800, type=83'
for at in 1 101; do
    truncate -s 100M part
    mkfs.ext4 -q part
    dd if=part of=disk.img bs=1M seek=$at conv=notrunc,sparse status=none
done
rm part
for name in precious golden scratch root swap esp boot falcon part1 part2 part3 one two; do cp small.img $name.img; done
for n in 0 1 2; do cp small.img disk.img.0$n; done
head -c 100000 /dev/zero >boot.bin
truncate -s 1M firmware.bin
echo "some notes" >notes.txt
cat >script.lua <<-'END'
	function open(readonly) return {} end
	function get_size(h) return 1024 * 1024 end
	function pread(h, count, offset) return string.rep("A", count) end
END
printf x >README.md
cat >plugin.c <<-'END'
	#define NBDKIT_API_VERSION 2
	#include <nbdkit-plugin.h>
	#include <string.h>
	#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
	static int my_config (const char *key, const char *value) { return 0; }
	static void *my_open (int readonly) { return NBDKIT_HANDLE_NOT_NEEDED; }
	static int64_t my_get_size (void *handle) { return 1024 * 1024; }
	static int my_pread (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
	{
	  memset (buf, 0, count);
	  return 0;
	}
	#ifdef __cplusplus
	static struct nbdkit_plugin describe () {
	  struct nbdkit_plugin plugin = {};
	  plugin.name = "my"; plugin.config = my_config; plugin.open = my_open;
	  plugin.get_size = my_get_size; plugin.pread = my_pread;
	  return plugin;
	}
	static struct nbdkit_plugin plugin = describe ();
	#else
	static struct nbdkit_plugin plugin = {
	  .name = "my", .config = my_config, .open = my_open, .get_size = my_get_size, .pread = my_pread,
	};
	#endif
	NBDKIT_REGISTER_PLUGIN (plugin)
END
gcc -shared -fPIC -I"$source/include" plugin.c -o my-plugin.so
cat >certificates <<-'END'
	#!/bin/sh
	# Certificates of a server, a client and who signed them, for localhost.
	set -e
	mkdir -p /tmp/pki/nbdkit /tmp/pki/client
	cd /tmp/pki/nbdkit
	make() {
	    certtool --generate-privkey --key-type=ecdsa --outfile "$1-key.pem" 2>/dev/null
	    printf '%s\n' "cn = $2" "$3" >"$1.info"
	    shift 3
	    certtool "$@" 2>/dev/null
	}
	make ca "An authority" "ca
	cert_signing_key" --generate-self-signed --load-privkey ca-key.pem --template ca.info --outfile ca-cert.pem
	for who in server client; do
	    make $who localhost "dns_name = localhost
	tls_www_$who
	signing_key" --generate-certificate --load-ca-certificate ca-cert.pem --load-ca-privkey ca-key.pem \
	        --load-privkey $who-key.pem --template $who.info --outfile $who-cert.pem
	done
	mv client-*.pem ../client
	cp ca-cert.pem ../client
END
chmod 755 certificates

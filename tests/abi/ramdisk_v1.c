/* A disk in memory, as simple as a plugin can be: version 1 of the interface, one request at a time.
 *
 *   gcc -shared -fPIC ramdisk_v1.c -o ramdisk-v1.so
 *   nbdkit ./ramdisk-v1.so size=64M
 */

#include <stdlib.h>
#include <string.h>

#include <nbdkit-plugin.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_SERIALIZE_ALL_REQUESTS

static int64_t size = 1024 * 1024;
static unsigned char *disk;

static int
ramdisk_config (const char *key, const char *value)
{
  if (strcmp (key, "size") == 0) {
    size = nbdkit_parse_size (value);
    return size == -1 ? -1 : 0;
  }
  nbdkit_error ("unknown parameter '%s'", key);
  return -1;
}

static int
ramdisk_config_complete (void)
{
  disk = calloc (1, (size_t) size + 1); /* never 0 bytes, for which NULL would be no failure */
  if (disk == NULL) {
    nbdkit_error ("no memory for a disk of %lld bytes", (long long) size);
    return -1;
  }
  return 0;
}

static void
ramdisk_unload (void)
{
  free (disk);
}

static void *
ramdisk_open (int readonly)
{
  nbdkit_debug ("open, readonly=%d", readonly);
  return NBDKIT_HANDLE_NOT_NEEDED;
}

static int64_t
ramdisk_get_size (void *handle)
{
  (void) handle;
  return size;
}

static int
ramdisk_pread (void *handle, void *buf, uint32_t count, uint64_t offset)
{
  (void) handle;
  memcpy (buf, disk + offset, count);
  return 0;
}

static int
ramdisk_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset)
{
  (void) handle;
  memcpy (disk + offset, buf, count);
  return 0;
}

static int
ramdisk_flush (void *handle)
{
  (void) handle;
  return 0; /* There is nothing more durable than this. */
}

static int
ramdisk_trim (void *handle, uint32_t count, uint64_t offset)
{
  (void) handle;
  memset (disk + offset, 0, count);
  return 0;
}

static int
ramdisk_zero (void *handle, uint32_t count, uint64_t offset, int may_trim)
{
  (void) handle;
  (void) may_trim;
  memset (disk + offset, 0, count);
  return 0;
}

static struct nbdkit_plugin plugin = {
  .name = "ramdisk-v1",
  .longname = "A disk in memory",
  .version = "1.0",
  .unload = ramdisk_unload,
  .config = ramdisk_config,
  .config_complete = ramdisk_config_complete,
  .config_help = "size=SIZE  The size of the disk, 1M by default.",
  .magic_config_key = "size",
  .open = ramdisk_open,
  .get_size = ramdisk_get_size,
  .pread = ramdisk_pread,
  .pwrite = ramdisk_pwrite,
  .flush = ramdisk_flush,
  .trim = ramdisk_trim,
  .zero = ramdisk_zero,
};

NBDKIT_REGISTER_PLUGIN (plugin)

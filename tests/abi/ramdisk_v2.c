/* A disk in memory that knows which of its blocks are in use: version 2 of the interface, any number of requests at
 * a time. It shows most of what a plugin can do.
 *
 *   gcc -shared -fPIC ramdisk_v2.c -o ramdisk-v2.so
 *   nbdkit ./ramdisk-v2.so size=64M
 */

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

#define BLOCK 4096

static int64_t size = 1024 * 1024;
static const char *description = "a disk in memory";

/* Protects what follows. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned char *disk;
static unsigned char *in_use; /* one for each block, 0 or 1; a block that is not in use is full of zeroes */

/* A connection. */
struct connection {
  int readonly;
  uint64_t requests;
};

static int
ramdisk_config (const char *key, const char *value)
{
  if (strcmp (key, "size") == 0) {
    size = nbdkit_parse_size (value);
    return size == -1 ? -1 : 0;
  }
  if (strcmp (key, "description") == 0) {
    description = nbdkit_strdup_intern (value);
    return description == NULL ? -1 : 0;
  }
  nbdkit_error ("unknown parameter '%s'", key);
  return -1;
}

static int
ramdisk_config_complete (void)
{
  if (size % BLOCK != 0) {
    nbdkit_error ("size must be a multiple of %d", BLOCK);
    return -1;
  }
  return 0;
}

static void
ramdisk_dump_plugin (void)
{
  printf ("ramdisk_block=%d\n", BLOCK);
}

static int
ramdisk_get_ready (void)
{
  /* Never 0 bytes, for which NULL would be no failure. */
  disk = calloc (1, (size_t) size + 1);
  in_use = calloc (1, (size_t) size / BLOCK + 1);
  if (disk == NULL || in_use == NULL) {
    nbdkit_error ("no memory for a disk of %lld bytes", (long long) size);
    return -1;
  }
  return 0;
}

static void
ramdisk_cleanup (void)
{
  free (disk);
  free (in_use);
  disk = in_use = NULL;
}

static int
ramdisk_list_exports (int readonly, int is_tls, struct nbdkit_exports *exports)
{
  (void) readonly;
  (void) is_tls;
  return nbdkit_add_export (exports, "ram", description);
}

static const char *
ramdisk_default_export (int readonly, int is_tls)
{
  (void) readonly;
  (void) is_tls;
  return "ram";
}

static void *
ramdisk_open (int readonly)
{
  struct connection *connection;

  if (strcmp (nbdkit_export_name (), "ram") != 0) {
    nbdkit_error ("there is no export '%s', only 'ram'", nbdkit_export_name ());
    nbdkit_set_error (ENOENT);
    return NULL;
  }
  connection = calloc (1, sizeof *connection);
  if (connection == NULL) {
    nbdkit_error ("no memory for a connection");
    return NULL;
  }
  connection->readonly = readonly;
  return connection;
}

static void
ramdisk_close (void *handle)
{
  struct connection *connection = handle;

  nbdkit_debug ("close after %llu requests", (unsigned long long) connection->requests);
  free (connection);
}

static const char *
ramdisk_export_description (void *handle)
{
  struct connection *connection = handle;

  return nbdkit_printf_intern ("%s%s", description, connection->readonly ? ", read-only" : "");
}

static int64_t
ramdisk_get_size (void *handle)
{
  (void) handle;
  return size;
}

static int
ramdisk_block_size (void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
  (void) handle;
  *minimum = 1;
  *preferred = BLOCK;
  *maximum = 32 * 1024 * 1024;
  return 0;
}

static int
yes (void *handle)
{
  (void) handle;
  return 1;
}

static int
ramdisk_can_fua (void *handle)
{
  (void) handle;
  return NBDKIT_FUA_NATIVE;
}

static int
ramdisk_can_cache (void *handle)
{
  (void) handle;
  return NBDKIT_CACHE_NATIVE;
}

static void
begin (void *handle)
{
  struct connection *connection = handle;

  pthread_mutex_lock (&lock);
  connection->requests++;
}

static void
end (void)
{
  pthread_mutex_unlock (&lock);
}

static int
ramdisk_pread (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void) flags;
  begin (handle);
  memcpy (buf, disk + offset, count);
  end ();
  return 0;
}

static int
ramdisk_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void) flags; /* FUA: nothing is more durable than this. */
  begin (handle);
  memcpy (disk + offset, buf, count);
  if (count > 0)
    memset (in_use + offset / BLOCK, 1, (offset + count - 1) / BLOCK - offset / BLOCK + 1);
  end ();
  return 0;
}

static int
ramdisk_flush (void *handle, uint32_t flags)
{
  (void) flags;
  begin (handle);
  end ();
  return 0;
}

/* Zeroes a range, and with may_trim takes its whole blocks out of use. */
static void
clear (uint32_t count, uint64_t offset, int may_trim)
{
  uint64_t first = (offset + BLOCK - 1) / BLOCK, after = (offset + count) / BLOCK;

  memset (disk + offset, 0, count);
  if (may_trim && first < after)
    memset (in_use + first, 0, after - first);
}

static int
ramdisk_trim (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void) flags;
  begin (handle);
  clear (count, offset, 1);
  end ();
  return 0;
}

static int
ramdisk_zero (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  begin (handle);
  clear (count, offset, (flags & NBDKIT_FLAG_MAY_TRIM) != 0);
  end ();
  return 0;
}

static int
ramdisk_extents (void *handle, uint32_t count, uint64_t offset, uint32_t flags, struct nbdkit_extents *extents)
{
  uint64_t at = offset - offset % BLOCK;
  int r = 0;

  begin (handle);
  while (r == 0 && at < offset + count) {
    uint64_t next = at + BLOCK;

    while (next < offset + count && in_use[next / BLOCK] == in_use[at / BLOCK])
      next += BLOCK;
    r = nbdkit_add_extent (extents, at, next - at,
                           in_use[at / BLOCK] ? 0 : NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO);
    if (flags & NBDKIT_FLAG_REQ_ONE)
      break;
    at = next;
  }
  end ();
  return r;
}

static int
ramdisk_cache (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void) count;
  (void) offset;
  (void) flags;
  begin (handle);
  end ();
  return 0;
}

static struct nbdkit_plugin plugin = {
  .name = "ramdisk-v2",
  .longname = "A disk in memory",
  .version = "2.0",
  .description = "Blocks that were never written, or were trimmed, are holes.",
  .config = ramdisk_config,
  .config_complete = ramdisk_config_complete,
  .config_help = "size=SIZE         The size of the disk, 1M by default.\n"
                 "description=TEXT  What clients are told of it.",
  .magic_config_key = "size",
  .dump_plugin = ramdisk_dump_plugin,
  .get_ready = ramdisk_get_ready,
  .cleanup = ramdisk_cleanup,
  .list_exports = ramdisk_list_exports,
  .default_export = ramdisk_default_export,
  .open = ramdisk_open,
  .close = ramdisk_close,
  .export_description = ramdisk_export_description,
  .get_size = ramdisk_get_size,
  .block_size = ramdisk_block_size,
  .can_multi_conn = yes,
  .can_fast_zero = yes,
  .can_fua = ramdisk_can_fua,
  .can_cache = ramdisk_can_cache,
  .pread = ramdisk_pread,
  .pwrite = ramdisk_pwrite,
  .flush = ramdisk_flush,
  .trim = ramdisk_trim,
  .zero = ramdisk_zero,
  .extents = ramdisk_extents,
  .cache = ramdisk_cache,
};

NBDKIT_REGISTER_PLUGIN (plugin)

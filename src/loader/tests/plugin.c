/* A plugin over a small array. It notes its callbacks in a file, and does wrong what it is told to. Compiled for both
 * versions of the interface.
 */

#ifndef NBDKIT_API_VERSION
#define NBDKIT_API_VERSION 2
#endif
#include <nbdkit-plugin.h>

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef THREAD_MODEL
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#endif

#define SIZE 65536

static char disk[SIZE];
static const char *log_name;
static const char *wrong = "";

int test_debug_level_one = 0;

static bool
is (const char *what)
{
  return strcmp (wrong, what) == 0;
}

static void
note (const char *format, ...)
{
  FILE *file;
  va_list args;

  if (log_name == NULL || (file = fopen (log_name, "a")) == NULL)
    return;
  va_start (args, format);
  vfprintf (file, format, args);
  va_end (args);
  fputc ('\n', file);
  fclose (file);
}

static void test_unload (void) { note ("unload"); }

static int
test_config (const char *key, const char *value)
{
  if (strcmp (key, "log") == 0)
    log_name = value;
  else if (strcmp (key, "wrong") == 0)
    wrong = value;
  else {
    nbdkit_error ("first of two");
    errno = ENOENT;
    nbdkit_error ("unknown parameter '%s': %m", key);
    return -1;
  }
  return 0;
}

static int
test_config_complete (void)
{
  note ("config_complete");
  if (is ("exit")) {
    nbdkit_error ("the last words");
    exit (7);
  }
  return 0;
}

static int test_get_ready (void) { note ("get_ready debug=%d", test_debug_level_one); return 0; }
static int test_after_fork (void) { note ("after_fork"); return 0; }
static void test_cleanup (void) { note ("cleanup"); }

static int
test_preconnect (int readonly)
{
  note ("preconnect readonly=%d uid=%d", readonly, (int) nbdkit_peer_uid ());
  return 0;
}

static void *
test_open (int readonly)
{
  note ("open %s", nbdkit_export_name ());
  if (is ("open"))
    return NULL;
  if (is ("open-error")) {
    nbdkit_error ("no such %s", nbdkit_export_name ());
    nbdkit_set_error (ENOENT);
    return NULL;
  }
  return NBDKIT_HANDLE_NOT_NEEDED;
}

static void test_close (void *handle) { note ("close"); }

static int64_t test_get_size (void *handle) { return is ("size") ? -5 : SIZE; }

/* What a request that goes wrong leaves behind. */
static int
fail (const char *what)
{
  if (is ("set-error")) {
    nbdkit_error ("%s went wrong", what);
    nbdkit_set_error (ENOSPC);
    errno = EPERM;
    return -1;
  }
  if (is ("errno")) {
    errno = EROFS;
    return -1;
  }
  return 0;
}

#if NBDKIT_API_VERSION == 1
#define FLAGS
#define FLAGS_VALUE 0u
#else
#define FLAGS , uint32_t flags
#define FLAGS_VALUE flags
#endif

static int
test_pread (void *handle, void *buf, uint32_t count, uint64_t offset FLAGS)
{
  if (fail ("pread") == -1)
    return -1;
  memcpy (buf, disk + offset, count);
  return 0;
}

static int
test_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset FLAGS)
{
  note ("pwrite %u %u flags=%u", count, (unsigned) offset, FLAGS_VALUE);
  if (fail ("pwrite") == -1)
    return -1;
  memcpy (disk + offset, buf, count);
  return 0;
}

static int
#if NBDKIT_API_VERSION == 1
test_flush (void *handle)
#else
test_flush (void *handle, uint32_t flags)
#endif
{
  note ("flush");
  return 0;
}

static int
test_trim (void *handle, uint32_t count, uint64_t offset FLAGS)
{
  note ("trim %u %u flags=%u", count, (unsigned) offset, FLAGS_VALUE);
  return 0;
}

static int
#if NBDKIT_API_VERSION == 1
test_zero (void *handle, uint32_t count, uint64_t offset, int flags)
#else
test_zero (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
#endif
{
  note ("zero %u %u flags=%u", count, (unsigned) offset, (unsigned) flags);
  if (is ("no-zero")) {
    nbdkit_set_error (EOPNOTSUPP);
    return -1;
  }
  memset (disk + offset, 0, count);
  return 0;
}

static int
test_extents (void *handle, uint32_t count, uint64_t offset, uint32_t flags,
              struct nbdkit_extents *extents)
{
  if (is ("no-extents"))
    return 0;
  if (is ("gap"))
    return nbdkit_add_extent (extents, offset + 1, 10, 0);
  if (nbdkit_add_extent (extents, 0, SIZE / 2, 0) == -1)
    return -1;
  return nbdkit_add_extent (extents, SIZE / 2, SIZE / 2, NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO);
}

static int
test_list_exports (int readonly, int is_tls, struct nbdkit_exports *exports)
{
  if (nbdkit_add_export (exports, "one", "the first") == -1)
    return -1;
  return nbdkit_use_default_export (exports);
}

static const char *test_default_export (int readonly, int is_tls) { return "two"; }

static const char *
test_export_description (void *handle)
{
  return nbdkit_printf_intern ("the disk %s", nbdkit_export_name ());
}

static int
test_block_size (void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
  *minimum = 512;
  *preferred = 4096;
  *maximum = is ("block-size") ? 1000 : 32768;
  return 0;
}

#ifndef NAME
#define NAME "test"
#endif

static struct nbdkit_plugin plugin = {
  .name = NAME,
  .longname = "a test",
  .version = "7.8",
  .magic_config_key = "log",
  .unload = test_unload,
  .config = test_config,
  .config_complete = test_config_complete,
#ifndef NO_OPEN
  .open = test_open,
#endif
  .close = test_close,
  .get_size = test_get_size,
  .pread = test_pread,
#ifndef READ_ONLY
  .pwrite = test_pwrite,
  .flush = test_flush,
  .trim = test_trim,
  .zero = test_zero,
#endif
#ifdef PRESERVED
  .errno_is_preserved = 1,
#endif
  .extents = test_extents,
  .preconnect = test_preconnect,
  .get_ready = test_get_ready,
  .after_fork = test_after_fork,
  .list_exports = test_list_exports,
  .default_export = test_default_export,
  .export_description = test_export_description,
  .cleanup = test_cleanup,
  .block_size = test_block_size,
};

#ifdef REGISTER_SIZE
/* A plugin of other times: it knows another number of fields. What follows those that it knows is not a plugin's. */
struct nbdkit_plugin *
plugin_init (void)
{
  plugin._struct_size = REGISTER_SIZE;
  plugin._api_version = REGISTER_VERSION;
  plugin._thread_model = THREAD_MODEL;
  return &plugin;
}
#else
NBDKIT_REGISTER_PLUGIN (plugin)
#endif

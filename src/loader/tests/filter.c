/* A filter that notes its callbacks, turns every byte over, and does by itself all that the interface lets a filter do
 * with the layers below it.
 */

#include <nbdkit-filter.h>

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *log_name;
static const char *mode = "";
static nbdkit_next *background;

struct handle {
  nbdkit_context *context;
  bool reopened;
};

static bool
is (const char *what)
{
  return strcmp (mode, what) == 0;
}

static void
note (const char *format, ...)
{
  FILE *file;
  va_list args;

  if (log_name == NULL || (file = fopen (log_name, "a")) == NULL)
    return;
  va_start (args, format);
  fputs ("filter: ", file);
  vfprintf (file, format, args);
  va_end (args);
  fputc ('\n', file);
  fclose (file);
}

static void turn_unload (void) { note ("unload"); }

static int
turn_config (nbdkit_next_config *next, nbdkit_backend *nxdata, const char *key, const char *value)
{
  if (strcmp (key, "log") == 0)
    log_name = value;
  if (strcmp (key, "mode") == 0) {
    mode = value;
    return 0;
  }
  return next (nxdata, key, value);
}

static int
turn_config_complete (nbdkit_next_config_complete *next, nbdkit_backend *nxdata)
{
  note ("config_complete");
  return next (nxdata);
}

#ifdef MODEL_OF_NEXT
static int
turn_thread_model (int next)
{
  note ("thread_model over %d", next);
  return NBDKIT_THREAD_MODEL_SERIALIZE_REQUESTS;
}
#else
static int turn_thread_model (void) { return NBDKIT_THREAD_MODEL_SERIALIZE_REQUESTS; }
#endif

static int turn_get_ready (int model) { note ("get_ready %d", model); return 0; }

static int
turn_after_fork (nbdkit_backend *backend)
{
  unsigned char byte;
  int err;

  background = nbdkit_next_context_open (backend, 1, "background", 1);
  if (background == NULL || background->prepare (background) == -1)
    return -1;
  if (background->pread (background, &byte, 1, 0, 0, &err) == -1)
    return -1;
  note ("after_fork read %d, can_write %d", byte, background->can_write (background));
  return 0;
}

static void
turn_cleanup (nbdkit_backend *backend)
{
  note ("cleanup");
  background->finalize (background);
  nbdkit_next_context_close (background);
}

static int
turn_preconnect (nbdkit_next_preconnect *next, nbdkit_backend *nxdata, int readonly)
{
  note ("preconnect pid=%d", (int) nbdkit_peer_pid ());
  if (is ("preconnect")) {
    nbdkit_error ("go away");
    return -1;
  }
  return next (nxdata, readonly);
}

static int
turn_list_exports (nbdkit_next_list_exports *next, nbdkit_backend *nxdata, int readonly, int is_tls,
                   struct nbdkit_exports *exports)
{
  struct nbdkit_exports *below = nbdkit_exports_new ();
  size_t i;
  int r = -1;

  if (below == NULL || next (nxdata, readonly, below) == -1)
    goto out;
  for (i = 0; i < nbdkit_exports_count (below); ++i) {
    const struct nbdkit_export e = nbdkit_get_export (below, i);
    char name[100];

    snprintf (name, sizeof name, "turned-%s", e.name);
    if (nbdkit_add_export (exports, name, e.description) == -1)
      goto out;
  }
  r = nbdkit_use_default_export (exports);
 out:
  nbdkit_exports_free (below);
  return r;
}

static const char *
turn_default_export (nbdkit_next_default_export *next, nbdkit_backend *nxdata, int readonly, int is_tls)
{
  const char *name = next (nxdata, readonly);

  return name ? nbdkit_printf_intern ("default-%s", name) : NULL;
}

static void *
turn_open (nbdkit_next_open *next, nbdkit_context *context, int readonly, const char *exportname,
           int is_tls)
{
  struct handle *h;

  note ("open %s", exportname);
  if (is ("no-open")) {
    nbdkit_error ("it stays closed");
    return NULL;
  }
  if (!is ("late") && next (context, readonly, exportname) == -1)
    return NULL;
  if (is ("late")) {
    nbdkit_next *own = nbdkit_next_context_open (nbdkit_context_get_backend (context), readonly,
                                                 exportname, 0);
    if (own == NULL || own->prepare (own) == -1 || nbdkit_context_set_next (context, own) != NULL)
      return NULL;
  }
  h = calloc (1, sizeof *h);
  h->context = context;
  return h;
}

static void turn_close (void *handle) { note ("close"); free (handle); }

static int
turn_prepare (nbdkit_next *next, void *handle, int readonly)
{
  note ("prepare readonly=%d size=%d", readonly, (int) next->get_size (next));
  return 0;
}

static int turn_finalize (nbdkit_next *next, void *handle) { note ("finalize"); return 0; }

static const char *
turn_export_description (nbdkit_next *next, void *handle)
{
  return nbdkit_printf_intern ("turned: %s", next->export_description (next));
}

static int
turn_can_zero (nbdkit_next *next, void *handle)
{
  if (is ("zero-none"))
    return NBDKIT_ZERO_NONE;
  if (is ("zero-native"))
    return NBDKIT_ZERO_NATIVE;
  return NBDKIT_ZERO_EMULATE;
}

static int
turn_pread (nbdkit_next *next, void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags,
            int *err)
{
  struct handle *h = handle;
  unsigned char *bytes = buf;
  uint32_t i;

  if (is ("errno")) {
    *err = ENOSPC;
    return -1;
  }
  if (is ("reopen") && !h->reopened) {
    nbdkit_next *old, *new;

    h->reopened = true;
    new = nbdkit_next_context_open (nbdkit_context_get_backend (h->context), 0, "again", 0);
    if (new == NULL || new->prepare (new) == -1)
      return -1;
    old = nbdkit_context_set_next (h->context, new);
    old->finalize (old);
    nbdkit_next_context_close (old);
    next = new;
  }
  if (next->pread (next, buf, count, offset, flags, err) == -1)
    return -1;
  for (i = 0; i < count; ++i)
    bytes[i] ^= 0xff;
  return 0;
}

static int
turn_pwrite (nbdkit_next *next, void *handle, const void *buf, uint32_t count, uint64_t offset,
             uint32_t flags, int *err)
{
  const unsigned char *bytes = buf;
  unsigned char *turned = malloc (count);
  uint32_t i;
  int r;

  for (i = 0; i < count; ++i)
    turned[i] = bytes[i] ^ 0xff;
  r = next->pwrite (next, turned, count, offset, flags, err);
  free (turned);
  return r;
}

static int
turn_zero (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
  note ("zero");
  return next->zero (next, count, offset, flags, err);
}

static int
turn_extents (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags,
              struct nbdkit_extents *extents, int *err)
{
  struct nbdkit_extents *full;
  size_t i;

  if (is ("aligned")) {
    uint64_t start = offset & ~UINT64_C (4095), end = (offset + count + 4095) & ~UINT64_C (4095);

    return nbdkit_extents_aligned (next, end - start, start, flags, 4096, extents, err);
  }
  if (is ("aligned-end"))
    return nbdkit_extents_aligned (next, next->get_size (next), 0, flags, 131072, extents, err);
  full = nbdkit_extents_full (next, count, offset, flags, err);
  if (full == NULL)
    return -1;
  for (i = 0; i < nbdkit_extents_count (full); ++i) {
    struct nbdkit_extent e = nbdkit_get_extent (full, i);

    if (nbdkit_add_extent (extents, e.offset, e.length, e.type & ~NBDKIT_EXTENT_ZERO) == -1) {
      *err = errno;
      break;
    }
  }
  nbdkit_extents_free (full);
  return 0;
}

static struct nbdkit_filter filter = {
  .name = "turn",
  .unload = turn_unload,
  .config = turn_config,
  .config_complete = turn_config_complete,
  .thread_model = turn_thread_model,
  .get_ready = turn_get_ready,
  .after_fork = turn_after_fork,
  .cleanup = turn_cleanup,
  .preconnect = turn_preconnect,
  .list_exports = turn_list_exports,
  .default_export = turn_default_export,
  .open = turn_open,
  .close = turn_close,
  .prepare = turn_prepare,
  .finalize = turn_finalize,
  .export_description = turn_export_description,
  .can_zero = turn_can_zero,
  .pread = turn_pread,
  .pwrite = turn_pwrite,
  .zero = turn_zero,
  .extents = turn_extents,
};

NBDKIT_REGISTER_FILTER (filter)

/* A filter that inverts every bit on its way: what is stored below is unreadable without it.
 *
 *   gcc -shared -fPIC invert.c -o invert.so
 *   nbdkit --filter=./invert.so file disk.img
 */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <nbdkit-filter.h>

/* invert=false turns it off. */
static int is_on = 1;

static int
invert_config (nbdkit_next_config *next, nbdkit_backend *backend, const char *key, const char *value)
{
  if (strcmp (key, "invert") == 0) {
    is_on = nbdkit_parse_bool (value);
    return is_on == -1 ? -1 : 0;
  }
  return next (backend, key, value);
}

static int
invert_thread_model (int next_thread_model)
{
  nbdkit_debug ("the layers below have thread model %d", next_thread_model);
  return NBDKIT_THREAD_MODEL_PARALLEL;
}

static void
invert_dump_plugin (void)
{
  printf ("invert_is_on=%d\n", is_on);
}

static void *
invert_open (nbdkit_next_open *next, nbdkit_context *context, int readonly, const char *exportname, int is_tls)
{
  (void) is_tls;
  if (next (context, readonly, exportname) == -1)
    return NULL;
  return NBDKIT_HANDLE_NOT_NEEDED;
}

/* Zeroes are ones below. The server writes them through this filter's pwrite. */
static int
invert_can_zero (nbdkit_next *next, void *handle)
{
  (void) handle;
  if (!is_on)
    return next->can_zero (next);
  switch (next->can_write (next)) {
  case -1:
    return -1;
  case 0:
    return NBDKIT_ZERO_NONE;
  default:
    return NBDKIT_ZERO_EMULATE;
  }
}

/* Holes below do not read as zeroes here. */
static int
invert_can_extents (nbdkit_next *next, void *handle)
{
  (void) handle;
  return is_on ? 0 : next->can_extents (next);
}

static void
invert_bytes (unsigned char *to, const unsigned char *from, uint32_t count)
{
  uint32_t i;

  for (i = 0; i < count; ++i)
    to[i] = is_on ? (unsigned char) ~from[i] : from[i];
}

static int
invert_pread (nbdkit_next *next, void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags,
              int *err)
{
  (void) handle;
  if (next->pread (next, buf, count, offset, flags, err) == -1)
    return -1;
  invert_bytes (buf, buf, count);
  return 0;
}

static int
invert_pwrite (nbdkit_next *next, void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags,
               int *err)
{
  unsigned char *inverted;
  int r;

  (void) handle;
  inverted = malloc (count > 0 ? count : 1);
  if (inverted == NULL) {
    nbdkit_error ("no memory for %u bytes", count);
    *err = ENOMEM;
    return -1;
  }
  invert_bytes (inverted, buf, count);
  r = next->pwrite (next, inverted, count, offset, flags, err);
  free (inverted);
  return r;
}

static struct nbdkit_filter filter = {
  .name = "invert",
  .longname = "Inverts all bits",
  .config = invert_config,
  .config_help = "invert=BOOL  false: nothing is changed.",
  .thread_model = invert_thread_model,
  .dump_plugin = invert_dump_plugin,
  .open = invert_open,
  .can_zero = invert_can_zero,
  .can_extents = invert_can_extents,
  .pread = invert_pread,
  .pwrite = invert_pwrite,
};

NBDKIT_REGISTER_FILTER (filter)

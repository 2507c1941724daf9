/* The interface of filters. nbdkit-filter(3) explains it.
 *
 * A filter fills a struct nbdkit_filter and registers it with NBDKIT_REGISTER_FILTER. What it leaves NULL passes to
 * the layer below. Unlike plugins, filters are compiled for one version of nbdkit: these headers' version goes into
 * the filter, and another server may refuse it.
 */

#ifndef NBDKIT_FILTER_H
#define NBDKIT_FILTER_H

#include <stdlib.h>

#include <nbdkit-common.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NBDKIT_FILTER_API_VERSION 6

/* Answers of can_zero. */
#define NBDKIT_ZERO_NONE    0 /* clients are not offered the request */
#define NBDKIT_ZERO_EMULATE 1 /* the server calls the filter's pwrite */
#define NBDKIT_ZERO_NATIVE  2 /* zero is called */

/* The layers below, as they are while no connection is open. */
typedef struct nbdkit_backend nbdkit_backend;
/* The filter's place in a connection. */
typedef struct nbdkit_context nbdkit_context;
/* The layers below, open for requests. */
typedef struct nbdkit_next_ops nbdkit_next;

/* What a callback of the same name calls to let the layer below do its part. The first argument is what the callback
 * was given.
 */
typedef int nbdkit_next_config (nbdkit_backend *backend, const char *key, const char *value);
typedef int nbdkit_next_config_complete (nbdkit_backend *backend);
typedef int nbdkit_next_preconnect (nbdkit_backend *backend, int readonly);
typedef int nbdkit_next_list_exports (nbdkit_backend *backend, int readonly, struct nbdkit_exports *exports);
typedef const char *nbdkit_next_default_export (nbdkit_backend *backend, int readonly);
typedef int nbdkit_next_open (nbdkit_context *context, int readonly, const char *exportname);

/* The layer below. Its functions are a plugin's, with an errno of their own: on failure *err is set. There is more
 * behind the structure than is declared here; only pointers to it can be passed on.
 */
struct nbdkit_next_ops {
  /* Only for contexts that the filter opened itself: before the first request, and after the last. */
  int (*prepare) (nbdkit_next *next);
  int (*finalize) (nbdkit_next *next);

  int64_t (*get_size) (nbdkit_next *next);
  const char *(*export_description) (nbdkit_next *next);
  int (*block_size) (nbdkit_next *next, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum);

  /* Asked of the layer once, then remembered. */
  int (*can_write) (nbdkit_next *next);
  int (*can_flush) (nbdkit_next *next);
  int (*is_rotational) (nbdkit_next *next);
  int (*can_trim) (nbdkit_next *next);
  int (*can_zero) (nbdkit_next *next);
  int (*can_fast_zero) (nbdkit_next *next);
  int (*can_extents) (nbdkit_next *next);
  int (*can_fua) (nbdkit_next *next);
  int (*can_multi_conn) (nbdkit_next *next);
  int (*can_cache) (nbdkit_next *next);

  int (*pread) (nbdkit_next *next, void *buf, uint32_t count, uint64_t offset, uint32_t flags, int *err);
  int (*pwrite) (nbdkit_next *next, const void *buf, uint32_t count, uint64_t offset, uint32_t flags,
                 int *err);
  int (*flush) (nbdkit_next *next, uint32_t flags, int *err);
  int (*trim) (nbdkit_next *next, uint32_t count, uint64_t offset, uint32_t flags, int *err);
  int (*zero) (nbdkit_next *next, uint32_t count, uint64_t offset, uint32_t flags, int *err);
  int (*extents) (nbdkit_next *next, uint32_t count, uint64_t offset, uint32_t flags,
                  struct nbdkit_extents *extents, int *err);
  int (*cache) (nbdkit_next *next, uint32_t count, uint64_t offset, uint32_t flags, int *err);
};

/* Lists of extents. */
struct nbdkit_extent {
  uint64_t offset; /* bytes */
  uint64_t length; /* bytes */
  uint32_t type;   /* NBDKIT_EXTENT_* */
};
/* An empty list for the bytes from start to before end; NULL on failure. */
extern struct nbdkit_extents *nbdkit_extents_new (uint64_t start, uint64_t end);
extern void nbdkit_extents_free (struct nbdkit_extents *extents);
extern size_t nbdkit_extents_count (const struct nbdkit_extents *extents);
extern struct nbdkit_extent nbdkit_get_extent (const struct nbdkit_extents *extents, size_t index);
/* A list of the whole range, from as many requests as that takes. */
extern struct nbdkit_extents *nbdkit_extents_full (nbdkit_next *next, uint32_t count, uint64_t offset,
                                                   uint32_t flags, int *err);
/* Fills a list with extents in whole blocks of `align` bytes. */
extern int nbdkit_extents_aligned (nbdkit_next *next, uint32_t count, uint64_t offset, uint32_t flags,
                                   uint32_t align, struct nbdkit_extents *extents, int *err);

/* Lists of exports. The strings stay until the list is freed. */
struct nbdkit_export {
  char *name;
  char *description; /* may be NULL */
};
extern struct nbdkit_exports *nbdkit_exports_new (void);
extern void nbdkit_exports_free (struct nbdkit_exports *exports);
extern size_t nbdkit_exports_count (const struct nbdkit_exports *exports);
extern struct nbdkit_export nbdkit_get_export (const struct nbdkit_exports *exports, size_t index);

/* Opening the layers below by hand: for work outside a client's requests, or to replace what a client's go to. */
extern nbdkit_backend *nbdkit_context_get_backend (nbdkit_context *context);
/* shared: 1 when connections of several clients may use it. NULL on failure. */
extern nbdkit_next *nbdkit_next_context_open (nbdkit_backend *backend, int readonly, const char *exportname,
                                              int shared);
extern void nbdkit_next_context_close (nbdkit_next *next);
/* Gives the connection another layer below, and returns the one it had, or NULL. */
extern nbdkit_next *nbdkit_context_set_next (nbdkit_context *context, nbdkit_next *next);

/* The callbacks that plugins have too mean the same; nbdkit-plugin.h describes them. Where one gets `next`, that is
 * how it reaches the layer below; requests report their errno through err.
 */
struct nbdkit_filter {
  /* Set by NBDKIT_REGISTER_FILTER. */
  int _api_version;
  const char *_version;

  /* Required: ASCII letters, digits and dashes, the first no dash. */
  const char *name;
  const char *longname;
  const char *description;

  void (*load) (void);
  void (*unload) (void);

  /* Parameters that are not the filter's are passed on to next. */
  int (*config) (nbdkit_next_config *next, nbdkit_backend *backend, const char *key, const char *value);
  int (*config_complete) (nbdkit_next_config_complete *next, nbdkit_backend *backend);
  const char *config_help;
  /* A thread model for the chain; a looser one than next_thread_model changes nothing. */
  int (*thread_model) (int next_thread_model);
  void (*dump_plugin) (void);
  /* With the thread model of the whole chain. These need not call the layer below: it had its turn already. */
  int (*get_ready) (int thread_model);
  int (*after_fork) (nbdkit_backend *backend);
  void (*cleanup) (nbdkit_backend *backend);
  int (*preconnect) (nbdkit_next_preconnect *next, nbdkit_backend *backend, int readonly);
  int (*list_exports) (nbdkit_next_list_exports *next, nbdkit_backend *backend, int readonly, int is_tls,
                       struct nbdkit_exports *exports);
  const char *(*default_export) (nbdkit_next_default_export *next, nbdkit_backend *backend, int readonly,
                                 int is_tls);

  /* Calls next unless the layer below is not to be opened, or later. */
  void *(*open) (nbdkit_next_open *next, nbdkit_context *context, int readonly, const char *exportname,
                 int is_tls);
  void (*close) (void *handle);

  /* After open, the innermost first, and before close, the outermost first. */
  int (*prepare) (nbdkit_next *next, void *handle, int readonly);
  int (*finalize) (nbdkit_next *next, void *handle);

  int64_t (*get_size) (nbdkit_next *next, void *handle);
  const char *(*export_description) (nbdkit_next *next, void *handle);
  int (*block_size) (nbdkit_next *next, void *handle, uint32_t *minimum, uint32_t *preferred,
                     uint32_t *maximum);

  int (*can_write) (nbdkit_next *next, void *handle);
  int (*can_flush) (nbdkit_next *next, void *handle);
  int (*is_rotational) (nbdkit_next *next, void *handle);
  int (*can_trim) (nbdkit_next *next, void *handle);
  /* NBDKIT_ZERO_* */
  int (*can_zero) (nbdkit_next *next, void *handle);
  int (*can_fast_zero) (nbdkit_next *next, void *handle);
  int (*can_extents) (nbdkit_next *next, void *handle);
  /* NBDKIT_FUA_* */
  int (*can_fua) (nbdkit_next *next, void *handle);
  int (*can_multi_conn) (nbdkit_next *next, void *handle);
  /* NBDKIT_CACHE_* */
  int (*can_cache) (nbdkit_next *next, void *handle);

  int (*pread) (nbdkit_next *next, void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags,
                int *err);
  int (*pwrite) (nbdkit_next *next, void *handle, const void *buf, uint32_t count, uint64_t offset,
                 uint32_t flags, int *err);
  int (*flush) (nbdkit_next *next, void *handle, uint32_t flags, int *err);
  int (*trim) (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err);
  int (*zero) (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err);
  int (*extents) (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags,
                  struct nbdkit_extents *extents, int *err);
  int (*cache) (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err);
};

/* Makes the filter known. `filter` is a variable of the type struct nbdkit_filter. */
#define NBDKIT_REGISTER_FILTER(filter)                                                \
  NBDKIT_CXX_LANG_C NBDKIT_DLL_PUBLIC struct nbdkit_filter *filter_init (void);       \
  struct nbdkit_filter *                                                              \
  filter_init (void)                                                                  \
  {                                                                                   \
    (filter)._api_version = NBDKIT_FILTER_API_VERSION;                                \
    (filter)._version = NBDKIT_VERSION_STRING;                                        \
    return &(filter);                                                                 \
  }

#ifdef __cplusplus
}
#endif

#endif

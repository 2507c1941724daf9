/* The interface of plugins. nbdkit-plugin(3) explains it.
 *
 * A plugin defines THREAD_MODEL and, for the current version of the interface, NBDKIT_API_VERSION as 2 before it
 * includes this header; fills a struct nbdkit_plugin; and registers it with NBDKIT_REGISTER_PLUGIN.
 */

#ifndef NBDKIT_PLUGIN_H
#define NBDKIT_PLUGIN_H

#include <nbdkit-common.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Version 2 gives the requests flags. A plugin that does not say gets version 1. */
#ifndef NBDKIT_API_VERSION
#define NBDKIT_API_VERSION 1
#endif
#if (NBDKIT_API_VERSION + 0) != 1 && (NBDKIT_API_VERSION + 0) != 2
#error NBDKIT_API_VERSION must be 1 or 2
#endif

/* Fields are never moved, and new ones come last: binaries rely on it. All fields but name, open, get_size and pread
 * may be NULL. Callbacks return 0 and on failure -1, unless they say otherwise; those that answer a question return
 * 1 for yes, 0 for no and -1.
 */
struct nbdkit_plugin {
  /* Set by NBDKIT_REGISTER_PLUGIN. */
  uint64_t _struct_size;
  int _api_version;
  int _thread_model;

  /* Required: ASCII letters, digits and dashes, the first no dash. */
  const char *name;
  /* For people. */
  const char *longname;
  const char *version;
  const char *description;

  /* First and last: the library was loaded, is about to be unloaded. */
  void (*load) (void);
  void (*unload) (void);

  /* One parameter KEY=VALUE; both strings stay until the plugin is unloaded. */
  int (*config) (const char *key, const char *value);
  /* There are no more parameters: whether those that there were are enough. */
  int (*config_complete) (void);
  /* Lines about the parameters, for --help. */
  const char *config_help;

  /* Required: a client connects. The handle, or NULL on failure. */
  void *(*open) (int readonly);
  void (*close) (void *handle);

  /* Required: in bytes. */
  int64_t (*get_size) (void *handle);

  /* What the disk can do. Missing: what there are callbacks for; not rotational. */
  int (*can_write) (void *handle);
  int (*can_flush) (void *handle);
  int (*is_rotational) (void *handle);
  int (*can_trim) (void *handle);

  /* The requests: all of it or an error. pread is required. */
#if NBDKIT_API_VERSION == 1
  int (*pread) (void *handle, void *buf, uint32_t count, uint64_t offset);
  int (*pwrite) (void *handle, const void *buf, uint32_t count, uint64_t offset);
  int (*flush) (void *handle);
  int (*trim) (void *handle, uint32_t count, uint64_t offset);
  int (*zero) (void *handle, uint32_t count, uint64_t offset, int may_trim);
#else
  /* The place of version 1's, which stays empty. */
  int (*_pread_v1) (void *, void *, uint32_t, uint64_t);
  int (*_pwrite_v1) (void *, const void *, uint32_t, uint64_t);
  int (*_flush_v1) (void *);
  int (*_trim_v1) (void *, uint32_t, uint64_t);
  int (*_zero_v1) (void *, uint32_t, uint64_t, int);
#endif

  /* 1: errno is set whenever a callback fails. 0: only nbdkit_set_error counts. */
  int errno_is_preserved;

  /* Prints KEY=VALUE lines for --dump-plugin. */
  void (*dump_plugin) (void);

  /* 0: zeroes are written with pwrite although there is zero. */
  int (*can_zero) (void *handle);
  /* NBDKIT_FUA_*. Missing: EMULATE if there is flush. Version 1: never NATIVE. */
  int (*can_fua) (void *handle);

#if NBDKIT_API_VERSION == 1
  /* The place of version 2's, which stays empty. */
  int (*_pread_v2) (void *, void *, uint32_t, uint64_t, uint32_t);
  int (*_pwrite_v2) (void *, const void *, uint32_t, uint64_t, uint32_t);
  int (*_flush_v2) (void *, uint32_t);
  int (*_trim_v2) (void *, uint32_t, uint64_t, uint32_t);
  int (*_zero_v2) (void *, uint32_t, uint64_t, uint32_t);
#else
  /* The requests, with NBDKIT_FLAG_*. */
  int (*pread) (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags);
  int (*pwrite) (void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags);
  int (*flush) (void *handle, uint32_t flags);
  int (*trim) (void *handle, uint32_t count, uint64_t offset, uint32_t flags);
  /* Writes zeroes. Failing with ENOTSUP or EOPNOTSUPP asks the server to use pwrite. */
  int (*zero) (void *handle, uint32_t count, uint64_t offset, uint32_t flags);
#endif

  /* The key of a parameter that is given without one. */
  const char *magic_config_key;

  /* What one connection has flushed is durable and visible on all others. */
  int (*can_multi_conn) (void *handle);

  /* Which parts of the disk are holes, and read as zeroes. */
  int (*can_extents) (void *handle);
  int (*extents) (void *handle, uint32_t count, uint64_t offset, uint32_t flags,
                  struct nbdkit_extents *extents);

  /* NBDKIT_CACHE_*. Missing: NATIVE if there is cache. */
  int (*can_cache) (void *handle);
  /* Caches data that will be read soon. */
  int (*cache) (void *handle, uint32_t count, uint64_t offset, uint32_t flags);

  /* After config_complete: a thread model no looser than THREAD_MODEL, for this configuration. */
  int (*thread_model) (void);

  /* zero obeys NBDKIT_FLAG_FAST_ZERO. */
  int (*can_fast_zero) (void *handle);

  /* A client has connected and not said anything yet. -1 turns it away. */
  int (*preconnect) (int readonly);

  /* Just before and after the server goes to the background. Threads survive only from after_fork on; users see
   * errors only until get_ready.
   */
  int (*get_ready) (void);
  int (*after_fork) (void);

  /* The exports that a client is told of. */
  int (*list_exports) (int readonly, int is_tls, struct nbdkit_exports *exports);
  /* The name for which "" stands; NULL: clients must ask by name. */
  const char *(*default_export) (int readonly, int is_tls);
  /* For people; may be NULL. */
  const char *(*export_description) (void *handle);

  /* All connections are closed; the server ends. */
  void (*cleanup) (void);

  /* The sizes of requests that are possible and best, in bytes; all 0: nothing to say. */
  int (*block_size) (void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum);
};

/* Makes the plugin known. `plugin` is a variable of the type struct nbdkit_plugin. */
#define NBDKIT_REGISTER_PLUGIN(plugin)                                                \
  NBDKIT_CXX_LANG_C NBDKIT_DLL_PUBLIC struct nbdkit_plugin *plugin_init (void);       \
  struct nbdkit_plugin *                                                              \
  plugin_init (void)                                                                  \
  {                                                                                   \
    (plugin)._struct_size = sizeof (plugin);                                          \
    (plugin)._api_version = NBDKIT_API_VERSION;                                       \
    (plugin)._thread_model = THREAD_MODEL;                                            \
    return &(plugin);                                                                 \
  }

#ifdef __cplusplus
}
#endif

#endif

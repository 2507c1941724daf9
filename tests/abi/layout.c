/* Prints the layout and the constants of the C interface, one "NAME VALUE" a line: compiled against two sets of
 * headers, it tells where they differ.
 */

#include <stddef.h>
#include <stdio.h>

#include <nbdkit-plugin.h>
#include <nbdkit-filter.h>

#define NUMBER(name) printf ("%s %ld\n", #name, (long) (name))
#define SIZE(type) printf ("sizeof %s %lu\n", #type, (unsigned long) sizeof (type))
#define FIELD(type, field)                                                                   \
  printf ("%s.%s %lu+%lu\n", #type, #field, (unsigned long) offsetof (struct type, field),   \
          (unsigned long) sizeof (((struct type *) 0)->field))
#define PLUGIN(field) FIELD (nbdkit_plugin, field)
#define NEXT(field) FIELD (nbdkit_next_ops, field)
#define FILTER(field) FIELD (nbdkit_filter, field)

int
main (void)
{
  NUMBER (NBDKIT_API_VERSION);
  NUMBER (NBDKIT_FILTER_API_VERSION);
  NUMBER (NBDKIT_THREAD_MODEL_SERIALIZE_CONNECTIONS);
  NUMBER (NBDKIT_THREAD_MODEL_SERIALIZE_ALL_REQUESTS);
  NUMBER (NBDKIT_THREAD_MODEL_SERIALIZE_REQUESTS);
  NUMBER (NBDKIT_THREAD_MODEL_PARALLEL);
  NUMBER (NBDKIT_FLAG_MAY_TRIM);
  NUMBER (NBDKIT_FLAG_FUA);
  NUMBER (NBDKIT_FLAG_REQ_ONE);
  NUMBER (NBDKIT_FLAG_FAST_ZERO);
  NUMBER (NBDKIT_FUA_NONE);
  NUMBER (NBDKIT_FUA_EMULATE);
  NUMBER (NBDKIT_FUA_NATIVE);
  NUMBER (NBDKIT_CACHE_NONE);
  NUMBER (NBDKIT_CACHE_EMULATE);
  NUMBER (NBDKIT_CACHE_NATIVE);
  NUMBER (NBDKIT_ZERO_NONE);
  NUMBER (NBDKIT_ZERO_EMULATE);
  NUMBER (NBDKIT_ZERO_NATIVE);
  NUMBER (NBDKIT_EXTENT_HOLE);
  NUMBER (NBDKIT_EXTENT_ZERO);

  SIZE (struct nbdkit_plugin);
  PLUGIN (_struct_size);
  PLUGIN (_api_version);
  PLUGIN (_thread_model);
  PLUGIN (name);
  PLUGIN (longname);
  PLUGIN (version);
  PLUGIN (description);
  PLUGIN (load);
  PLUGIN (unload);
  PLUGIN (config);
  PLUGIN (config_complete);
  PLUGIN (config_help);
  PLUGIN (open);
  PLUGIN (close);
  PLUGIN (get_size);
  PLUGIN (can_write);
  PLUGIN (can_flush);
  PLUGIN (is_rotational);
  PLUGIN (can_trim);
  PLUGIN (pread);
  PLUGIN (pwrite);
  PLUGIN (flush);
  PLUGIN (trim);
  PLUGIN (zero);
  PLUGIN (errno_is_preserved);
  PLUGIN (dump_plugin);
  PLUGIN (can_zero);
  PLUGIN (can_fua);
  PLUGIN (magic_config_key);
  PLUGIN (can_multi_conn);
  PLUGIN (can_extents);
  PLUGIN (extents);
  PLUGIN (can_cache);
  PLUGIN (cache);
  PLUGIN (thread_model);
  PLUGIN (can_fast_zero);
  PLUGIN (preconnect);
  PLUGIN (get_ready);
  PLUGIN (after_fork);
  PLUGIN (list_exports);
  PLUGIN (default_export);
  PLUGIN (export_description);
  PLUGIN (cleanup);
  PLUGIN (block_size);

  SIZE (struct nbdkit_next_ops);
  NEXT (prepare);
  NEXT (finalize);
  NEXT (get_size);
  NEXT (export_description);
  NEXT (block_size);
  NEXT (can_write);
  NEXT (can_flush);
  NEXT (is_rotational);
  NEXT (can_trim);
  NEXT (can_zero);
  NEXT (can_fast_zero);
  NEXT (can_extents);
  NEXT (can_fua);
  NEXT (can_multi_conn);
  NEXT (can_cache);
  NEXT (pread);
  NEXT (pwrite);
  NEXT (flush);
  NEXT (trim);
  NEXT (zero);
  NEXT (extents);
  NEXT (cache);

  SIZE (struct nbdkit_extent);
  FIELD (nbdkit_extent, offset);
  FIELD (nbdkit_extent, length);
  FIELD (nbdkit_extent, type);
  SIZE (struct nbdkit_export);
  FIELD (nbdkit_export, name);
  FIELD (nbdkit_export, description);

  SIZE (struct nbdkit_filter);
  FILTER (_api_version);
  FILTER (_version);
  FILTER (name);
  FILTER (longname);
  FILTER (description);
  FILTER (load);
  FILTER (unload);
  FILTER (config);
  FILTER (config_complete);
  FILTER (config_help);
  FILTER (thread_model);
  /* Here newer headers have dump_plugin. */
  FILTER (get_ready);
  FILTER (after_fork);
  FILTER (cleanup);
  FILTER (preconnect);
  FILTER (list_exports);
  FILTER (default_export);
  FILTER (open);
  FILTER (close);
  FILTER (prepare);
  FILTER (finalize);
  FILTER (get_size);
  FILTER (export_description);
  FILTER (block_size);
  FILTER (can_write);
  FILTER (can_flush);
  FILTER (is_rotational);
  FILTER (can_trim);
  FILTER (can_zero);
  FILTER (can_fast_zero);
  FILTER (can_extents);
  FILTER (can_fua);
  FILTER (can_multi_conn);
  FILTER (can_cache);
  FILTER (pread);
  FILTER (pwrite);
  FILTER (flush);
  FILTER (trim);
  FILTER (zero);
  FILTER (extents);
  FILTER (cache);
  return 0;
}

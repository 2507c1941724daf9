/* Prints the constants of the interface and the offset of each field of its structures, as the headers have them. */

#ifdef PLUGIN
#include <nbdkit-plugin.h>
#else
#include <nbdkit-filter.h>
#endif

#include <stddef.h>
#include <stdio.h>

#define SIZE(type) printf ("%s %zu\n", #type, sizeof (struct type))
#define C(constant) printf ("%s %d\n", #constant, (int) NBDKIT_##constant)
#define FIELD(type, field) printf ("%s.%s %zu\n", #type, #field, offsetof (struct type, field))

int
main (void)
{
  C (THREAD_MODEL_SERIALIZE_CONNECTIONS); C (THREAD_MODEL_SERIALIZE_ALL_REQUESTS);
  C (THREAD_MODEL_SERIALIZE_REQUESTS); C (THREAD_MODEL_PARALLEL); C (FLAG_MAY_TRIM); C (FLAG_FUA);
  C (FLAG_REQ_ONE); C (FLAG_FAST_ZERO); C (FUA_NONE); C (FUA_EMULATE); C (FUA_NATIVE);
  C (CACHE_NONE); C (CACHE_EMULATE); C (CACHE_NATIVE); C (EXTENT_HOLE); C (EXTENT_ZERO);
#ifdef PLUGIN
#define P(field) FIELD (nbdkit_plugin, field)
  SIZE (nbdkit_plugin);
  P (_struct_size); P (_api_version); P (_thread_model); P (name); P (longname); P (version);
  P (description); P (load); P (unload); P (config); P (config_complete); P (config_help); P (open);
  P (close); P (get_size); P (can_write); P (can_flush); P (is_rotational); P (can_trim);
#if NBDKIT_API_VERSION == 1
  FIELD (nbdkit_plugin, pread); FIELD (nbdkit_plugin, pwrite); FIELD (nbdkit_plugin, flush);
  FIELD (nbdkit_plugin, trim); FIELD (nbdkit_plugin, zero);
#else
  P (_pread_v1); P (_pwrite_v1); P (_flush_v1); P (_trim_v1); P (_zero_v1);
  P (pread); P (pwrite); P (flush); P (trim); P (zero);
#endif
  P (errno_is_preserved); P (dump_plugin); P (can_zero); P (can_fua); P (magic_config_key);
  P (can_multi_conn); P (can_extents); P (extents); P (can_cache); P (cache); P (thread_model);
  P (can_fast_zero); P (preconnect); P (get_ready); P (after_fork); P (list_exports);
  P (default_export); P (export_description); P (cleanup); P (block_size);
#else
#define F(field) FIELD (nbdkit_filter, field)
#define N(field) FIELD (nbdkit_next_ops, field)
  C (FILTER_API_VERSION); C (ZERO_NONE); C (ZERO_EMULATE); C (ZERO_NATIVE);
  SIZE (nbdkit_filter); SIZE (nbdkit_next_ops); SIZE (nbdkit_extent); SIZE (nbdkit_export);
  F (_api_version); F (_version); F (name); F (longname); F (description); F (load); F (unload);
  F (config); F (config_complete); F (config_help); F (thread_model);
#ifdef HAS_DUMP_PLUGIN
  F (dump_plugin);
#endif
  F (get_ready); F (after_fork);
  F (cleanup); F (preconnect); F (list_exports); F (default_export); F (open); F (close);
  F (prepare); F (finalize); F (get_size); F (export_description); F (block_size); F (can_write);
  F (can_flush); F (is_rotational); F (can_trim); F (can_zero); F (can_fast_zero); F (can_extents);
  F (can_fua); F (can_multi_conn); F (can_cache); F (pread); F (pwrite); F (flush); F (trim);
  F (zero); F (extents); F (cache);
  N (prepare); N (finalize); N (get_size); N (export_description); N (block_size); N (can_write);
  N (can_flush); N (is_rotational); N (can_trim); N (can_zero); N (can_fast_zero); N (can_extents);
  N (can_fua); N (can_multi_conn); N (can_cache); N (pread); N (pwrite); N (flush); N (trim);
  N (zero); N (extents); N (cache);
  FIELD (nbdkit_extent, offset); FIELD (nbdkit_extent, length); FIELD (nbdkit_extent, type);
  FIELD (nbdkit_export, name); FIELD (nbdkit_export, description);
#endif
  return 0;
}

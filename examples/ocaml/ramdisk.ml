(* A RAM disk.

   ocamlopt.opt -output-obj -runtime-variant _pic -o nbdkit-ramdisk-plugin.so NBDKit.cmx ramdisk.ml -cclib -lnbdkitocaml
   nbdkit ./nbdkit-ramdisk-plugin.so 100M *)
open Bigarray

let disk = ref (Array1.create char c_layout 0)

let config key value =
  if key <> "size" then failwith ("unknown parameter " ^ key);
  disk := Array1.create char c_layout (Int64.to_int (NBDKit.parse_size value));
  Array1.fill !disk '\000'

let config_complete () = if Array1.dim !disk = 0 then failwith "size= is missing: say how large the disk is"
let part offset count = Array1.sub !disk (Int64.to_int offset) count
let pread () buf offset _ = Array1.blit (part offset (Array1.dim buf)) buf
let pwrite () buf offset _ = Array1.blit buf (part offset (Array1.dim buf))
let zero () count offset _ = Array1.fill (part offset (Int64.to_int count)) '\000'

let () =
  NBDKit.register_plugin
    {
      NBDKit.default_callbacks with
      name = "ramdisk";
      config_help = "size=SIZE  (required) The size of the disk.";
      magic_config_key = "size";
      config = Some config;
      config_complete = Some config_complete;
      open_connection = Some (fun _readonly -> ());
      get_size = Some (fun () -> Int64.of_int (Array1.dim !disk));
      can_multi_conn = Some (fun () -> true);
      pread = Some pread;
      pwrite = Some pwrite;
      flush = Some (fun () _ -> ());
      zero = Some zero;
    }

(* The pieces of the page of 2019, made whole. *)
open Printf

type handle = { h_id : int; h_readonly : bool }

let disk = Bytes.make 1048576 '\000'
let id = ref 0

let myplugin_open readonly =
  incr id;
  { h_id = !id; h_readonly = readonly }

let myplugin_get_size handle =
  printf "handle ID = %d\n" handle.h_id;
  Int64.of_int (Bytes.length disk)

let myplugin_pread _ buf offset _ =
  let offset = Int64.to_int offset in
  if offset = 666 * 512 then failwith "bad sector";
  for i = 0 to Bigarray.Array1.dim buf - 1 do
    buf.{i} <- Bytes.get disk (offset + i)
  done

let myplugin_pwrite handle buf offset _ =
  assert (not handle.h_readonly);
  let offset = Int64.to_int offset in
  for i = 0 to Bigarray.Array1.dim buf - 1 do
    Bytes.set disk (offset + i) buf.{i}
  done

let plugin = {
  NBDKit.default_callbacks with
  NBDKit.name = "myplugin";
  version = "1.0";
  open_connection = Some myplugin_open;
  get_size = Some myplugin_get_size;
  pread = Some myplugin_pread;
  pwrite = Some myplugin_pwrite;
  thread_model = Some (fun () -> NBDKit.THREAD_MODEL_SERIALIZE_CONNECTIONS);
}

let () = NBDKit.register_plugin plugin

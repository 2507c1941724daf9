(* A disk of a TiB with a line of text at the beginning of each GiB and holes between.

   nbdkit ./nbdkit-sparse-plugin.so --run 'nbdinfo --map "$uri" | head' *)
let gib = 1 lsl 30
let block = 4096
let size = 1024 * gib

let line index =
  let text = Printf.sprintf "This is GiB %d of %d.\n" index (size / gib) in
  text ^ String.make (block - String.length text) '\000'

(* Calls [visit data offset length] for each piece of the range that is all data (then [data] is its GiB) or all hole. *)
let each offset count visit =
  let stop = min (offset + count) size in
  let rec go offset =
    if offset < stop then begin
      let index = offset / gib and at = offset mod gib in
      let is_data = at < block in
      let length = min ((if is_data then block else gib) - at) (stop - offset) in
      visit (if is_data then Some index else None) offset length;
      go (offset + length)
    end
  in
  go offset

let pread () buf offset _ =
  let start = Int64.to_int offset in
  each start (Bigarray.Array1.dim buf) (fun data offset length ->
      let part = Bigarray.Array1.sub buf (offset - start) length in
      match data with
      | Some index -> NBDKit.blit_to part (String.sub (line index) (offset mod gib) length)
      | None -> Bigarray.Array1.fill part '\000')

let extents () count offset flags =
  let count = if List.mem NBDKit.Req_one flags then 1 else Int64.to_int count in
  let list = ref [] in
  each (Int64.to_int offset) count (fun data offset length ->
      let is_hole = data = None in
      list := { NBDKit.offset = Int64.of_int offset; length = Int64.of_int length; is_hole; is_zero = is_hole } :: !list);
  List.rev !list

let () =
  NBDKit.register_plugin
    {
      NBDKit.default_callbacks with
      name = "sparse";
      open_connection = Some (fun _readonly -> ());
      get_size = Some (fun () -> Int64.of_int size);
      can_multi_conn = Some (fun () -> true);
      pread = Some pread;
      extents = Some extents;
    }

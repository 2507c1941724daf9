//! Volume groups put together from the physical volumes that there are.

use super::{Group, PhysicalVolume, Segment, Volume};

/// A volume group, and where its physical volumes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assembly {
    /// By its newest metadata.
    pub group: Group,
    /// For each of its members, the index of the disk that it is, or why there is none.
    places: Vec<Result<usize, String>>,
    /// The sizes of the members in bytes, as far as they are there.
    sizes: Vec<u64>,
}

/// Puts groups together from physical volumes and their sizes in bytes. Of several versions of a group's metadata the newest
/// counts.
pub fn assemble(found: &[(PhysicalVolume, u64)]) -> Vec<Assembly> {
    let mut groups: Vec<&Group> = Vec::new();
    for group in found.iter().filter_map(|(volume, _)| volume.group.as_ref()) {
        match groups.iter_mut().find(|known| known.id == group.id) {
            Some(known) if known.sequence < group.sequence => *known = group,
            Some(_) => {}
            None => groups.push(group),
        }
    }
    groups.into_iter().map(|group| Assembly::new(group.clone(), found)).collect()
}

impl Assembly {
    fn new(group: Group, found: &[(PhysicalVolume, u64)]) -> Self {
        let (mut places, mut sizes) = (Vec::new(), Vec::new());
        for member in &group.members {
            let mut all = (0..).zip(found).filter(|(_, (volume, _))| volume.id == member.id);
            let (place, size) = match (all.next(), all.next()) {
                (Some((index, (_, size))), None) => (Ok(index), *size),
                (Some(_), Some(_)) => {
                    (Err(format!("its physical volume {} is there more than once", member.id)), 0)
                }
                (None, _) => (Err(format!("its physical volume {} is missing", member.id)), 0),
            };
            places.push(place);
            sizes.push(size);
        }
        Assembly { group, places, sizes }
    }

    /// Whether all of a volume can be reached.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check(&self, volume: &Volume) -> Result<(), String> {
        for segment in volume.segments.as_ref().map_err(Clone::clone)? {
            for (member, start) in &segment.stripes {
                self.places[*member].as_ref().map_err(Clone::clone)?;
                if start + stripe_length(segment) > self.sizes[*member] {
                    return Err(format!(
                        "its physical volume {} is too short",
                        self.group.members[*member].id
                    ));
                }
            }
        }
        Ok(())
    }

    /// Where a byte of a volume is: the index of the disk, the offset in that, and how many bytes from there on follow each
    /// other. None: past the end, or it cannot be reached.
    pub fn locate(&self, volume: &Volume, offset: u64) -> Option<(usize, u64, u64)> {
        let (member, start, length) = volume.locate(offset)?;
        let disk = self.places.get(member)?.as_ref().ok()?;
        Some((*disk, start, length))
    }

    /// The index of the disk that a member of the group is, if it is there.
    pub fn place(&self, member: usize) -> Option<usize> {
        self.places.get(member)?.as_ref().ok().copied()
    }

    /// Reads a volume through `read`, which takes the index of a disk too.
    ///
    /// # Errors
    /// Those of `read`. False: it is not all within the volume.
    pub fn read<E>(
        &self,
        volume: &Volume,
        buf: &mut [u8],
        mut offset: u64,
        mut read: impl FnMut(usize, &mut [u8], u64) -> Result<(), E>,
    ) -> Result<bool, E> {
        let mut rest = buf;
        while !rest.is_empty() {
            let Some((disk, at, length)) = self.locate(volume, offset) else { return Ok(false) };
            let length = length.min(rest.len() as u64);
            let (piece, after) = rest.split_at_mut(length as usize);
            read(disk, piece, at)?;
            rest = after;
            offset += length;
        }
        Ok(true)
    }
}

/// How much of each physical volume a segment takes, in bytes.
fn stripe_length(segment: &Segment) -> u64 {
    segment.length / segment.stripes.len() as u64
}

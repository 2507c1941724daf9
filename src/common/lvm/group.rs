//! A volume group as its metadata have it.

use super::{SECTOR, text::Node};

/// Stripes of a segment that are accepted: LVM has up to 128.
const MAX_STRIPES: usize = 128;

/// A volume group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its identifier.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Counts the changes of the metadata: the highest is the newest.
    pub sequence: u64,
    /// The physical volumes it consists of.
    pub members: Vec<Member>,
    /// The logical volumes that are there to be used.
    pub volumes: Vec<Volume>,
}

/// A physical volume as the group knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its identifier, as in its own label.
    pub id: String,
    /// The name that the metadata have for it.
    name: String,
    /// Where its data begin, in bytes.
    start: u64,
}

/// A logical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Its identifier.
    pub id: String,
    /// Its size in bytes.
    pub size: u64,
    /// The metadata allow that it is written to.
    pub writable: bool,
    /// Where its bytes are, in ascending order and without gaps; or why it cannot be shown.
    pub segments: Result<Vec<Segment>, String>,
}

/// A part of a logical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts in the volume, in bytes.
    pub start: u64,
    /// Its length in bytes, not 0.
    pub length: u64,
    /// Bytes of one stripe; those of the stripes come in turn.
    pub stripe_size: u64,
    /// The index of the physical volume in [`Group::members`], and where in it the stripe starts, in bytes. Never empty.
    pub stripes: Vec<(usize, u64)>,
}

impl Segment {
    /// Where a byte of the volume is that is within the segment: the index of the physical volume, the offset in that, and how
    /// many bytes from there on follow each other.
    pub fn locate(&self, offset: u64) -> (usize, u64, u64) {
        let into = offset - self.start;
        let left = self.length - into;
        let [(member, start)] = self.stripes[..] else {
            let (row, within) = (into / self.stripe_size, into % self.stripe_size);
            let count = self.stripes.len() as u64;
            let (member, start) = self.stripes[(row % count) as usize];
            return (
                member,
                start + row / count * self.stripe_size + within,
                (self.stripe_size - within).min(left),
            );
        };
        (member, start + into, left)
    }
}

impl Volume {
    /// As [`Segment::locate`]. None: past the end, or the volume cannot be shown.
    pub fn locate(&self, offset: u64) -> Option<(usize, u64, u64)> {
        let segments = self.segments.as_ref().ok()?;
        let index = segments.partition_point(|segment| segment.start + segment.length <= offset);
        segments.get(index).map(|segment| segment.locate(offset))
    }
}

impl Group {
    /// The name that the device mapper has for a volume: hyphens in names are doubled, one stands between.
    pub fn device_name(&self, volume: &Volume) -> String {
        let double = |name: &str| name.replace('-', "--");
        format!("{}-{}", double(&self.name), double(&volume.name))
    }

    /// Reads the metadata. None: what every group has is missing.
    pub(super) fn from_text(text: &Node) -> Option<Group> {
        let (name, section) = text.entries().iter().find(|(_, node)| matches!(node, Node::Section(_)))?;
        let extent = section.number("extent_size")?.checked_mul(SECTOR).filter(|size| *size > 0)?;
        let mut group = Group {
            id: section.text("id")?.to_owned(),
            name: name.clone(),
            sequence: section.number("seqno")?,
            members: Vec::new(),
            volumes: Vec::new(),
        };
        for (name, member) in section.get("physical_volumes").map(Node::entries).unwrap_or_default() {
            group.members.push(Member {
                id: member.text("id")?.to_owned(),
                name: name.clone(),
                start: member.number("pe_start")?.checked_mul(SECTOR)?,
            });
        }
        for (name, volume) in section.get("logical_volumes").map(Node::entries).unwrap_or_default() {
            let has = |node: &Node, word: &str| {
                node.list("status").iter().any(|n| matches!(n, Node::Text(t) if t == word))
            };
            let writable = has(section, "WRITE") && has(volume, "WRITE");
            // Parts of other volumes are not for users.
            if !has(volume, "VISIBLE") {
                continue;
            }
            let id = volume.text("id").unwrap_or_default().to_owned();
            let segments = group.segments(volume, extent);
            let size = section_size(volume, extent);
            group.volumes.push(Volume { name: name.clone(), id, size, writable, segments });
        }
        // What a snapshot was made of needs the snapshot to be written to.
        let snapshots = section.get("logical_volumes").map(Node::entries).unwrap_or_default();
        for (_, volume) in snapshots {
            let Some(segment) = volume.get("segment1").filter(|s| s.text("type") == Some("snapshot")) else {
                continue;
            };
            for (key, role) in [("origin", "the origin of a snapshot"), ("cow_store", "a snapshot")] {
                let named = segment.text(key);
                for volume in group.volumes.iter_mut().filter(|volume| Some(volume.name.as_str()) == named) {
                    volume.segments = Err(format!("it is {role}"));
                }
            }
        }
        Some(group)
    }

    fn segments(&self, volume: &Node, extent: u64) -> Result<Vec<Segment>, String> {
        let damaged = || "its metadata make no sense".to_owned();
        let mut segments = Vec::new();
        let mut end = 0;
        for number in 1..=volume.number("segment_count").ok_or_else(damaged)? {
            let segment = volume.get(&format!("segment{number}")).ok_or_else(damaged)?;
            match segment.text("type").ok_or_else(damaged)? {
                "striped" | "linear" => {}
                other => return Err(format!("volumes of type {other} are not understood")),
            }
            let segment = self.segment(segment, extent).ok_or_else(damaged)?;
            if segment.start != end {
                return Err(damaged());
            }
            end = segment.start.checked_add(segment.length).ok_or_else(damaged)?;
            segments.push(segment);
        }
        if segments.is_empty() { Err(damaged()) } else { Ok(segments) }
    }

    fn segment(&self, segment: &Node, extent: u64) -> Option<Segment> {
        let extents = |name| segment.number(name)?.checked_mul(extent);
        let (start, length) = (extents("start_extent")?, extents("extent_count")?);
        let mut stripes = Vec::new();
        for pair in segment.list("stripes").chunks(2) {
            let [Node::Text(name), Node::Number(first)] = pair else { return None };
            let member = self.members.iter().position(|member| member.name == *name)?;
            let first = u64::try_from(*first).ok()?.checked_mul(extent)?;
            stripes.push((member, self.members[member].start.checked_add(first)?));
        }
        let count = stripes.len() as u64;
        if stripes.is_empty() || stripes.len() > MAX_STRIPES || segment.number("stripe_count") != Some(count)
        {
            return None;
        }
        let stripe_size = match count {
            1 => length,
            _ => segment.number("stripe_size")?.checked_mul(SECTOR)?,
        };
        let whole =
            stripe_size > 0 && length > 0 && (count == 1 || length % count.checked_mul(stripe_size)? == 0);
        // What a stripe ends with must be a number too.
        stripes.iter().all(|(_, start)| start.checked_add(length).is_some()).then_some(())?;
        whole.then_some(Segment { start, length, stripe_size, stripes })
    }
}

/// The size that the segments say, whatever they are of.
fn section_size(volume: &Node, extent: u64) -> u64 {
    let segments = volume.entries().iter().filter(|(name, _)| name.starts_with("segment"));
    segments.fold(0, |size, (_, segment)| {
        let extents = segment.number("extent_count").unwrap_or(0);
        size.saturating_add(extents.saturating_mul(extent))
    })
}

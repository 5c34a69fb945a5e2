//! Guests as operators run them: every sort of memory and machine arrives with each byte in its
//! place, and the report says whether memory was used directly. Only the BIOS runs inside, and the
//! test itself puts content into RAM, so that each page says where it belongs.

use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use testbed::guest::{Bytes, Guest, Network, Place, compare};
use testbed::pair::TestFolder;
use testbed::product::{self, Product};
use testbed::requirement::{Requirement, met};

const MOVE_MAX: Duration = Duration::from_secs(90);
/// Marked pages of each large block, spread over all of it.
const MARKS: u64 = 40;
/// Blocks of fewer pages are ROMs, which are left as they are.
const MARKED_PAGES_MIN: u64 = 4096;
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";
const MEMFD: &str = "memory-backend-memfd,share=on,size=";
const CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// Whether each end uses main RAM directly.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Mapped {
    source: bool,
    target: bool,
}

const BOTH: Mapped = Mapped {
    source: true,
    target: true,
};
const NEITHER: Mapped = Mapped {
    source: false,
    target: false,
};

/// Content that the test put into a page.
#[derive(Debug)]
struct Mark {
    block: String,
    page: u64,
    content: Vec<u8>,
}

/// Words of QEMU's command line that differ between the sorts; `{here}` is a folder of this end.
struct Sort {
    name: &'static str,
    source: String,
    target: String,
    mapped: Mapped,
    /// All bytes of all blocks are compared; else the marked pages alone.
    whole: bool,
}

impl Sort {
    fn same(name: &'static str, words: String, mapped: Mapped) -> Self {
        Self {
            name,
            source: words.clone(),
            target: words,
            mapped,
            whole: true,
        }
    }
}

fn can_run() -> anyhow::Result<bool> {
    let qemu = Requirement::Program("qemu-system-x86_64");
    met(&[Requirement::Root, qemu, Requirement::Product])
}

/// Says that a test cannot run here; where no skip is allowed that is an error.
fn skip(reason: &str) -> anyhow::Result<()> {
    let is_error = std::env::var_os("REQUIRE_ALL").is_some_and(|value| value == "1");
    anyhow::ensure!(!is_error, "{reason}, and REQUIRE_ALL=1 allows no skip");
    eprintln!("Skipped: {reason}");
    Ok(())
}

fn nodes(count: u32) -> String {
    let node = |n| {
        format!(" -object {MEMFD}32M,id=ram{n} -numa node,nodeid={n},memdev=ram{n} -smp {count}")
    };
    let all: String = (0..count).map(node).collect();
    format!("-M q35 -m {}M{all}", 32 * count)
}

/// S9: equal nodes have memfds of equal name and size; only the inode tells them apart.
#[test]
fn two_and_four_equal_numa_nodes() -> anyhow::Result<()> {
    check(&Sort::same("numa2", nodes(2), BOTH))?;
    check(&Sort::same("numa4", nodes(4), BOTH))
}

#[test]
fn plain_and_half_plain_ram() -> anyhow::Result<()> {
    let plain = "-M pc -m 64M".to_owned();
    let memfd = format!("-M pc,memory-backend=pc.ram -m 64M -object {MEMFD}64M,id=pc.ram");
    let memory = "-M pc,memory-backend=pc.ram -m 64M -object memory-backend-ram,size=64M,id=pc.ram";
    check(&Sort::same("plain", plain, NEITHER))?;
    // One end alone.
    let only_source = Sort {
        name: "memfd-plain",
        source: memfd.clone(),
        target: memory.to_owned(),
        mapped: Mapped {
            source: true,
            target: false,
        },
        whole: true,
    };
    check(&only_source)?;
    check(&Sort {
        name: "plain-memfd",
        source: only_source.target,
        target: memfd,
        mapped: Mapped {
            source: false,
            target: true,
        },
        whole: true,
    })
}

/// A target's file that holds old data: what is not announced must be zero all the same.
#[test]
fn a_file_with_old_data() -> anyhow::Result<()> {
    let words = "-M q35,memory-backend=pc.ram -m 64M \
        -object memory-backend-file,share=on,size=64M,id=pc.ram,mem-path={here}/ram";
    check(&Sort::same("file", words.to_owned(), BOTH))
}

#[test]
fn a_gibibyte_quarter_with_vga_and_usb() -> anyhow::Result<()> {
    for machine in ["q35", "pc"] {
        let words = format!(
            "-M {machine},memory-backend=pc.ram -m 256M -object {MEMFD}256M,id=pc.ram -device VGA \
             -device qemu-xhci -device usb-tablet -device usb-kbd"
        );
        check(&Sort::same("vga-usb", words, BOTH))?;
    }
    Ok(())
}

/// A DIMM that was plugged in while the source ran is there from the start at the target.
#[test]
fn a_hot_plugged_dimm() -> anyhow::Result<()> {
    let base = format!(
        "-M q35,memory-backend=pc.ram -m 64M,slots=2,maxmem=1G -object {MEMFD}64M,id=pc.ram"
    );
    let dimm = format!(" -object {MEMFD}128M,id=more -device pc-dimm,id=dimm0,memdev=more");
    check_with(
        &Sort {
            name: "dimm",
            source: base.clone(),
            target: base + &dimm,
            mapped: BOTH,
            whole: true,
        },
        |source| {
            let more = json!({"qom-type": "memory-backend-memfd", "id": "more", "size": 128 << 20, "share": true});
            source.monitor().execute("object-add", &more)?;
            let dimm = json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "more"});
            source.monitor().execute("device_add", &dimm)?;
            Ok(())
        },
        &[],
    )
}

/// Huge pages are read directly, and written through QEMU's stream: they have no `pwrite`.
#[test]
fn huge_pages() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let before = fs::read_to_string(HUGE_PAGES)?;
    let _reserved = HugePages { before };
    fs::write(HUGE_PAGES, "80")?;
    let reserved: u32 = fs::read_to_string(HUGE_PAGES)?.trim().parse()?;
    if reserved < 80 {
        return skip(&format!(
            "this host has {reserved} of 80 huge pages of 2 MiB"
        ));
    }
    let words = format!(
        "-M q35,memory-backend=pc.ram -m 64M -object {MEMFD}64M,hugetlb=on,hugetlbsize=2M,id=pc.ram"
    );
    let mapped = Mapped {
        source: true,
        target: false,
    };
    check(&Sort::same("huge", words, mapped))
}

/// Puts the host's number of huge pages back.
struct HugePages {
    before: String,
}

impl Drop for HugePages {
    fn drop(&mut self) {
        fs::write(HUGE_PAGES, self.before.trim()).ok();
    }
}

/// UEFI: code and variables are flash, which travels in the stream.
#[test]
fn uefi() -> anyhow::Result<()> {
    if !Path::new(CODE).is_file() {
        return skip(&format!("{CODE} is missing: run testbed/setup.sh"));
    }
    let words = format!(
        "-M q35,memory-backend=pc.ram -m 128M -object {MEMFD}128M,id=pc.ram \
         -drive if=pflash,unit=0,format=raw,readonly=on,file={CODE} \
         -drive if=pflash,unit=1,format=raw,snapshot=on,file={VARS}"
    );
    check(&Sort::same("uefi", words, BOTH))
}

/// 16 GiB that are almost all zero. Private memory: reading a hole of a memfd through QEMU's own map
/// would fill it.
#[test]
fn sixteen_gibibytes() -> anyhow::Result<()> {
    check(&Sort {
        whole: false,
        ..Sort::same("16g", "-M q35 -m 16G".to_owned(), NEITHER)
    })
}

/// S8: a boot sector changes a page and changes it back, over and over, while xbzrle is on. With it
/// QEMU would not tell again of a page that is as it was; `send` switches it off and reads RAM.
#[test]
fn a_page_that_changes_back_under_xbzrle() -> anyhow::Result<()> {
    let words = format!(
        "-M pc,memory-backend=pc.ram -m 64M -object {MEMFD}64M,id=pc.ram \
         -drive if=ide,format=raw,snapshot=on,file={{here}}/boot"
    );
    check_with(
        &Sort::same("xbzrle", words, BOTH),
        |source| source.monitor().set_capabilities(&[("xbzrle", true)]),
        // Four rounds at least see the page in either state.
        &["--max-bandwidth", "40M"],
    )
}

/// 25 bytes: `mov ax, 0x1000; mov ds, ax`, then for ever: write 1, wait, write 0, wait.
fn boot_sector() -> Vec<u8> {
    let mut sector = vec![
        0xb8, 0x00, 0x10, 0x8e, 0xd8, // ds = 0x1000: the page at 64 KiB
        0xc6, 0x06, 0x00, 0x00, 0x01, // byte [0] = 1
        0x49, 0x75, 0xfd, // dec cx; jnz
        0xc6, 0x06, 0x00, 0x00, 0x00, // byte [0] = 0
        0x49, 0x75, 0xfd, // dec cx; jnz
        0xeb, 0xee, // again
    ];
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector
}

fn check(sort: &Sort) -> anyhow::Result<()> {
    check_with(sort, |_| Ok(()), &[])
}

/// Moves such a guest to the other end, and from there back into fresh memory; after each move every
/// byte is compared.
fn check_with(
    sort: &Sort,
    prepare: impl Fn(&Guest) -> anyhow::Result<()>,
    more: &[&str],
) -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let folder = TestFolder::new(sort.name)?;
    let source = start(&sort.source, &folder.path().join("a"), &[])?;
    prepare(&source).context("the source could not be prepared")?;
    let marks = mark(&source)?;
    let waiting = |name: &str| {
        let folder = folder.path().join(name);
        start(&sort.target, &folder, &["-incoming", "defer"])
    };
    let target = waiting("b")?;
    let program = product::program()?;
    let installation = |name: &str| Product::new(Place::Here, &program, &folder.path().join(name));
    let ends = (installation("one"), installation("other"));
    product::introduce(&ends.0, &ends.1)?;
    let there = ((&ends.0, &source), (&ends.1, &target));
    let mapped = transfer(folder.path(), there.0, there.1, more)?;
    assert_eq!(mapped, sort.mapped, "{}", sort.name);
    same(sort, &marks, &source, &target)?;
    if !sort.whole {
        return Ok(());
    }
    source.quit();
    let fresh = waiting("c")?;
    let mapped = transfer(folder.path(), (&ends.1, &target), (&ends.0, &fresh), &[])?;
    if sort.source == sort.target {
        assert_eq!(mapped, sort.mapped, "{} back", sort.name);
    }
    same(sort, &marks, &target, &fresh)
}

/// Both hold the same bytes; and the marks are where they were put, but for those on which the BIOS
/// has worked at the source too.
fn same(sort: &Sort, marks: &[Mark], source: &Guest, target: &Guest) -> anyhow::Result<()> {
    if sort.whole {
        let comparison = compare(source, target)?;
        assert_eq!(comparison.differing(), 0, "{}: {comparison:?}", sort.name);
    }
    let (before, after) = (Bytes::of(source)?, Bytes::of(target)?);
    let mut kept = 0;
    for mark in marks {
        let content = before.page(&mark.block, mark.page)?;
        assert!(
            after.page(&mark.block, mark.page)? == content,
            "{}: {mark:?}",
            sort.name
        );
        kept += usize::from(content.starts_with(&mark.content));
    }
    assert!(kept * 10 >= marks.len() * 9, "{kept} of {}", marks.len());
    Ok(())
}

/// One move; both QEMUs stay, stopped. Returns what the reports say.
fn transfer(
    folder: &Path,
    (sender, source): (&Product<'_>, &Guest),
    (receiver, target): (&Product<'_>, &Guest),
    more: &[&str],
) -> anyhow::Result<Mapped> {
    let port = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
    let address = format!("127.0.0.1:{port}");
    let words = |guest: &Guest, report: &Path, more: &[&str]| -> Vec<String> {
        let monitor = guest.product_monitor().display().to_string();
        let report = report.display().to_string();
        let own = ["--vm", "sorts", "--qmp", &monitor, "--report", &report];
        own.iter()
            .chain(more)
            .map(|word| (*word).to_owned())
            .collect()
    };
    let reports = (folder.join("send.json"), folder.join("receive.json"));
    let how = ["--listen", &address, "--paused", "--verify", "full"];
    let arguments = words(target, &reports.1, &how);
    let mut receive = receiver.start("receive", &arguments, &folder.join("receive.log"))?;
    receive.wait_listening()?;
    let how = [&["--to", &address, "--keep-source"][..], more].concat();
    let mut send = sender.start(
        "send",
        &words(source, &reports.0, &how),
        &folder.join("send.log"),
    )?;
    let codes = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    assert_eq!(codes, (0, 0), "{}\n{}", send.output(), receive.output());
    let read = |path: &PathBuf| -> anyhow::Result<Value> {
        serde_json::from_slice(&fs::read(path)?).context("the report is no JSON")
    };
    let mapped = |report: &Value| report["mapped"].as_bool().context("no word of `mapped`");
    Ok(Mapped {
        source: mapped(&read(&reports.0)?)?,
        target: mapped(&read(&reports.1)?)?,
    })
}

/// Starts a QEMU of the sort in a folder of its own, with a file of old data and a boot sector there.
fn start(words: &str, folder: &Path, more: &[&str]) -> anyhow::Result<Guest> {
    fs::create_dir_all(folder)?;
    fs::write(folder.join("ram"), vec![0xa5; 64 << 20])?;
    fs::write(folder.join("boot"), boot_sector())?;
    let here = folder.display().to_string();
    let monitors = ["lab", "product"].map(|name| {
        let path = folder.join(format!("{name}.sock"));
        format!("-qmp unix:{},server=on,wait=off", path.display())
    });
    let words = format!(
        "{} {} -accel tcg -nodefaults -display none",
        words.replace("{here}", &here),
        monitors.join(" ")
    );
    let arguments: Vec<String> = words
        .split_whitespace()
        .chain(more.iter().copied())
        .map(str::to_owned)
        .collect();
    let qemu = Path::new("qemu-system-x86_64");
    Guest::of_arguments(Place::Here, qemu, &arguments, &Network::Nothing, folder)
}

/// Writes the name and number of pages into them, all over the middle of each large block.
fn mark(guest: &Guest) -> anyhow::Result<Vec<Mark>> {
    let memory = Bytes::of(guest)?;
    let mut marks = Vec::new();
    for (block, pages) in memory.blocks() {
        if pages < MARKED_PAGES_MIN || block.contains("vram") || block.contains("flash") {
            continue;
        }
        for number in 0..MARKS {
            let page = pages / 4 + number * (pages / 2 / MARKS);
            let content = format!("{block} {page}").into_bytes();
            memory.spoil(block, page, &content)?;
            let block = block.to_owned();
            marks.push(Mark {
                block,
                page,
                content,
            });
        }
    }
    assert!(!marks.is_empty(), "no block to mark: {:?}", memory.blocks());
    Ok(marks)
}

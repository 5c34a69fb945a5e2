//! House rules that a program can check. Each message says what to do.

use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a file, tests not counted.
const FILE_LINES_MAX: usize = 600;
/// Logic in a `mod.rs`; its docs, types and re-exports are not counted here, so this is generous.
const MOD_LINES_MAX: usize = 400;
const TOP_LEVEL: [&str; 13] = [
    "Cargo.toml",
    "Cargo.lock",
    "Makefile",
    "README.md",
    "src",
    "transport",
    "qemu-glue",
    "benches",
    "testbed",
    "docs",
    "packaging",
    "LICENSE",
    "rustfmt.toml",
];
const EMPTY_NAMES: [&str; 8] = [
    "manager", "handler", "helper", "helpers", "util", "utils", "common", "misc",
];
const UNSAFE_FOLDERS: [&str; 3] = ["qemu-glue/src/memory", "transport/src/store", "testbed/src"];
/// The tool that builds fuzz targets asks for these names.
const GENERATED: [&str; 3] = ["target", "corpus", "artifacts"];

fn root() -> PathBuf {
    let testbed = Path::new(env!("CARGO_MANIFEST_DIR"));
    testbed
        .parent()
        .map_or_else(|| testbed.to_owned(), Path::to_owned)
}

/// All files of the project below the root, by their paths from it.
fn files() -> Vec<String> {
    let root = root();
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)
            .expect("the checkout can be read")
            .flatten()
        {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == ".git" || GENERATED.contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(inner) = path.strip_prefix(&root) {
                found.push(inner.display().to_string());
            }
        }
    }
    found.sort();
    found
}

fn rust_files() -> Vec<String> {
    files()
        .into_iter()
        .filter(|path| path.ends_with(".rs"))
        .collect()
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_default()
}

#[track_caller]
fn assert_none(rule: &str, broken: &[String]) {
    assert!(broken.is_empty(), "{rule}\n{}", broken.join("\n"));
}

/// Lines before the file's test module.
fn lines_without_tests(text: &str) -> usize {
    text.lines()
        .take_while(|line| !line.starts_with("#[cfg(test)]"))
        .count()
}

#[test]
fn files_are_short() {
    let is_test = |path: &str| path.contains("/tests/") || path.ends_with("tests.rs");
    let broken: Vec<String> = rust_files()
        .into_iter()
        .filter(|path| !is_test(path))
        .map(|path| (lines_without_tests(&text(&path)), path))
        .filter(|(lines, path)| {
            *lines
                > if path.ends_with("/mod.rs") {
                    MOD_LINES_MAX
                } else {
                    FILE_LINES_MAX
                }
        })
        .map(|(lines, path)| format!("{path}: {lines} lines"))
        .collect();
    assert_none("split these files by subject", &broken);
}

#[test]
fn folders_are_whole() {
    let root = root();
    let broken: Vec<String> = rust_files()
        .into_iter()
        .filter(|path| root.join(path.trim_end_matches(".rs")).is_dir())
        .collect();
    assert_none("foo.rs beside foo/: make it foo/mod.rs", &broken);
}

#[test]
fn names_say_something() {
    let broken: Vec<String> = files()
        .into_iter()
        .filter(|path| {
            path.split(['/', '.']).any(|part| {
                EMPTY_NAMES.contains(&part)
                    || part
                        .split(['_', '-'])
                        .any(|word| EMPTY_NAMES.contains(&word) || matches!(word, "dst"))
            })
        })
        .collect();
    assert_none(
        "name these after what they do; say source and target",
        &broken,
    );
}

#[test]
fn unsafe_stays_in_its_folders() {
    // Put together, so that this file does not find itself.
    let words = [
        ["unsafe", " {"].concat(),
        ["unsafe", " fn"].concat(),
        ["unsafe", " impl"].concat(),
    ];
    let broken: Vec<String> = rust_files()
        .into_iter()
        .filter(|path| !UNSAFE_FOLDERS.iter().any(|folder| path.starts_with(folder)))
        .filter(|path| {
            text(path).lines().any(|line| {
                let code = line.split("//").next().unwrap_or_default();
                words.iter().any(|word| code.contains(word.as_str()))
            })
        })
        .collect();
    assert_none("unsafe code belongs into its folders only", &broken);
}

#[test]
fn dependencies_have_reasons() {
    let manifest = text("Cargo.toml");
    let section = manifest
        .split("[workspace.dependencies]\n")
        .nth(1)
        .and_then(|rest| rest.split("\n[").next())
        .unwrap_or_default();
    let entries: Vec<&str> = section.lines().filter(|line| line.contains('=')).collect();
    assert!(entries.len() > 5, "[workspace.dependencies] was not found");
    let broken: Vec<String> = entries
        .into_iter()
        .filter(|line| {
            line.split('#')
                .nth(1)
                .is_none_or(|reason| reason.trim().len() < 4)
        })
        .map(str::to_owned)
        .collect();
    assert_none("give each dependency a reason on its line", &broken);
}

#[test]
fn members_take_versions_from_the_workspace() {
    let mut broken = Vec::new();
    for path in files()
        .into_iter()
        .filter(|path| path.ends_with("Cargo.toml"))
    {
        let is_fuzz = path.contains("/fuzz/");
        for section in text(&path).split("\n[").skip(1) {
            let head = section.lines().next().unwrap_or_default();
            if is_fuzz || head == "workspace.dependencies]" || !head.ends_with("dependencies]") {
                continue;
            }
            let entries = section.lines().skip(1).filter(|line| line.contains('='));
            broken.extend(
                entries
                    .filter(|line| !line.contains("workspace = true"))
                    .map(|line| format!("{path}: {line}")),
            );
        }
    }
    assert_none("write versions in [workspace.dependencies]", &broken);
}

#[test]
fn top_level_is_known() {
    let broken: Vec<String> = fs::read_dir(root())
        .expect("the checkout can be read")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.') && name != "target")
        .filter(|name| !TOP_LEVEL.contains(&name.as_str()))
        .collect();
    assert_none("these belong into a folder", &broken);
}

/// Where a file was written is nobody's business but the writer's.
#[test]
fn files_name_no_workplace() {
    let words = [
        "/work/",
        "/root/.",
        "/home/",
        ".internal",
        "artifactory",
        "nexus.",
    ];
    let mut broken = Vec::new();
    for path in files()
        .into_iter()
        .filter(|path| path != "testbed/tests/tidy.rs")
    {
        for (number, line) in text(&path).lines().enumerate() {
            if words.iter().any(|word| line.contains(word)) {
                broken.push(format!("{path}:{}: {line}", number + 1));
            }
        }
    }
    assert_none("no paths of a machine, no hosts of a registry", &broken);
}

#[test]
fn lock_file_names_the_public_registry() {
    let broken: Vec<String> = text("Cargo.lock")
        .lines()
        .filter(|line| line.starts_with("source = "))
        .filter(|line| !line.contains("registry+https://github.com/rust-lang/crates.io-index"))
        .map(str::to_owned)
        .collect();
    assert_none("Cargo.lock must name crates.io", &broken);
}

#[test]
fn crates_forbid_unsafe_where_they_can() {
    let broken: Vec<String> = ["src/main.rs", "testbed/link/src/lib.rs"]
        .into_iter()
        .filter(|path| !text(path).contains("forbid(unsafe_code)"))
        .map(str::to_owned)
        .collect();
    assert_none("say #![forbid(unsafe_code)]", &broken);
}

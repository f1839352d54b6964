//! Files that lie: what `tests/hostile/make.py` wrote, answered as its `expected.tsv` says.

use std::{collections::BTreeSet, fs, path::Path};

use vmix::{Adapter, ApplyTo, DType, Result, Selection, Untrained, Values};

/// What a file is opened with.
type Open = fn(Source<'_>) -> Result<()>;

/// The same file on disk and in memory.
#[derive(Clone, Copy)]
enum Source<'a> {
    Path(&'a Path),
    Bytes(&'a [u8]),
}

fn adapter(source: Source<'_>) -> Result<Adapter> {
    match source {
        Source::Path(path) => Adapter::open(path),
        Source::Bytes(bytes) => Adapter::from_bytes(bytes.to_vec()),
    }
}

fn preset(source: Source<'_>) -> Result<()> {
    match source {
        Source::Path(path) => Values::open(path),
        Source::Bytes(bytes) => Values::from_bytes(bytes.to_vec()),
    }
    .map(drop)
}

fn init(source: Source<'_>) -> Result<()> {
    match source {
        Source::Path(path) => Untrained::open(path),
        Source::Bytes(bytes) => Untrained::from_bytes(bytes.to_vec()),
    }
    .map(drop)
}

const KINDS: [Open; 3] = [|source| adapter(source).map(drop), preset, init];

/// Opens an adapter and uses all of it.
fn values(source: Source<'_>) -> Result<()> {
    let adapter = adapter(source).expect("its numbers are finite one by one");
    let every = Selection::only(0..adapter.labels().len());
    adapter.project(&every)?;
    adapter.values(&every, ApplyTo::Both, DType::F32).map(drop)
}

#[test]
fn files_that_lie_are_refused_in_these_words() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile");
    let table = fs::read_to_string(folder.join("expected.tsv")).unwrap();
    let mut wrong = String::new();
    let mut listed = BTreeSet::new();
    for line in table.lines() {
        let [name, opened, expected] = line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        listed.insert(name.to_owned());
        let open = match opened {
            "adapter" => KINDS[0],
            "preset" => preset,
            "init" => init,
            "values" => values,
            other => panic!("{other}"),
        };
        let path = folder.join(name);
        let mut answers = vec![(path.display().to_string(), open(Source::Path(&path)))];
        if path.is_file() {
            let bytes = fs::read(&path).unwrap();
            answers.push(("bytes".to_owned(), open(Source::Bytes(&bytes))));
        }
        for (source, answer) in answers {
            let said = match &answer {
                Ok(()) => "(opens)".to_owned(),
                Err(error) => error.to_string(),
            };
            // A file that opens is not named by what fails later.
            let in_file = answer.is_err() && opened != "values";
            let start = if in_file {
                format!("{source}: {expected}")
            } else {
                expected.to_owned()
            };
            if !said.starts_with(&start) {
                wrong += &format!("{name} as {opened}:\n  {said}\n  not: {expected}\n");
            }
        }
        let opens = KINDS.iter().any(|open| open(Source::Path(&path)).is_ok());
        if vmix::open(&path).is_ok() != opens {
            wrong += &format!("{name}: open() disagrees\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    let files: BTreeSet<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    listed.remove(".");
    assert_eq!(files, listed);
}

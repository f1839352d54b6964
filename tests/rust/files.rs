//! Files: round trips, and what is refused with which words.

use crate::parts::{Parts, small, tensor, zeros};
use proptest::prelude::*;
use vmix::{Adapter, ApplyTo, Base, DType, Data, Opened, Selection, Tensor, Values};

fn small_bytes() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    small().adapter().unwrap().save(&path).unwrap();
    std::fs::read(path).unwrap()
}

#[test]
fn adapters_come_back_as_they_were_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    let made = small().adapter().unwrap();
    made.save(&path).unwrap();
    let opened = Adapter::open(&path).unwrap();
    assert_eq!(opened.labels(), made.labels());
    assert_eq!(opened.metadata(), &small().metadata);
    assert_eq!(&opened.layers()[..], &made.layers()[..]);
    assert_eq!(
        opened.layers()[0].name,
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    );
    assert_eq!((opened.context_tokens(), opened.context_dim()), (5, 6));
    // Equal content, equal bytes: hashes of files mean something.
    assert_eq!(std::fs::read(&path).unwrap(), small_bytes());
    // Replacing the file leaves the open one intact.
    zeros(Base::Sd15).adapter().unwrap().save(&path).unwrap();
    let values = opened
        .values(&Selection::All, ApplyTo::Both, DType::F32)
        .unwrap();
    let expected = made
        .values(&Selection::All, ApplyTo::Both, DType::F32)
        .unwrap();
    assert_eq!(values.to_bytes().unwrap(), expected.to_bytes().unwrap());
}

#[test]
fn a_file_says_itself_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file.safetensors");
    let adapter = small().adapter().unwrap();
    adapter.save(&path).unwrap();
    assert!(matches!(vmix::open(&path).unwrap(), Opened::Adapter(_)));
    let error = Values::open(&path).unwrap_err().to_string();
    assert!(
        error.ends_with("`vmix.kind`: expected `preset`, found `adapter`"),
        "{error}"
    );
    let values = adapter
        .values(&Selection::None, ApplyTo::Cond, DType::F16)
        .unwrap();
    values.save(&path).unwrap();
    assert!(matches!(vmix::open(&path).unwrap(), Opened::Preset(_)));
    let error = Adapter::open(&path).unwrap_err().to_string();
    assert!(
        error.ends_with("`vmix.kind`: expected `adapter`, found `preset`"),
        "{error}"
    );
    let error = vmix::open(folder.path().join("absent"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("absent") && error.contains("No such file"),
        "{error}"
    );
}

#[test]
fn known_bases_are_checked_exactly() {
    for base in [Base::Sd15, Base::Sdxl] {
        let adapter = zeros(base).adapter().unwrap();
        let layers = base.layers().unwrap();
        assert_eq!(&adapter.layers()[..], &layers[..]);
        assert_eq!(adapter.context_dim(), base.context_dim().unwrap());
        let last = format!("{}.to_v_aes.weight", layers.last().unwrap().name);

        let mut parts = zeros(base);
        parts.tensors.remove(&last).unwrap();
        let error = parts.adapter().unwrap_err().to_string();
        let (rows, dim) = (
            layers.last().unwrap().inner_dim,
            base.context_dim().unwrap(),
        );
        let expected =
            format!("bytes: tensor `{last}`: expected shape [{rows}, {dim}], found no such tensor");
        assert_eq!(error, expected);

        let mut parts = zeros(base);
        let extra = "down_blocks.9.attentions.0.transformer_blocks.0.attn2.to_v_aes.weight";
        parts.put(extra, tensor(&[2, 2], 0));
        let error = parts.adapter().unwrap_err().to_string();
        assert_eq!(
            error,
            format!("bytes: tensor `{extra}`: expected no such tensor, found one")
        );

        let mut parts = zeros(base);
        parts.put(&last, tensor(&[2, dim], 0));
        let error = parts.adapter().unwrap_err().to_string();
        let expected =
            format!("tensor `{last}`: expected shape [{rows}, {dim}], found shape [2, {dim}]");
        assert!(error.ends_with(&expected), "{error}");
    }
}

/// Every way in which a file can be wrong: what is changed, and how the message must start.
#[test]
fn wrong_files_are_refused_by_name() {
    type Change = fn(&mut Parts);
    let cases: &[(Change, &str)] = &[
        (
            |p| p.set("vmix.format", "2"),
            "metadata `vmix.format`: expected `1`, as in every VMix file, found `2`",
        ),
        (
            |p| p.set("vmix.kind", "lora"),
            "metadata `vmix.kind`: expected one of adapter, preset, found `lora`",
        ),
        (
            |p| p.set("vmix.base", "sd3"),
            "metadata `vmix.base`: expected one of sd15, sdxl, other, found `sd3`",
        ),
        (
            |p| p.set("vmix.base", "sdxl"),
            "metadata `vmix.context_tokens`: expected `77`, as in every sdxl U-Net, found `5`",
        ),
        (
            |p| p.set("vmix.labels", "[]"),
            "metadata `vmix.labels`: expected a JSON list",
        ),
        (
            |p| p.set("vmix.context_tokens", "99999999999999999999"),
            "metadata `vmix.context_tokens`: expected a whole number from 1 to 4096",
        ),
        (
            |p| p.set("vmix.context_dim", "7"),
            "metadata `vmix.context_dim`: expected `6`",
        ),
        (
            |p| p.set("vmix.feature", "pooled"),
            "metadata `vmix.feature`: expected `context_eot`",
        ),
        (
            |p| p.set("vmix.norm_eps", "0"),
            "metadata `vmix.norm_eps`: expected a number above 0",
        ),
        (
            |p| p.set("vmix.projection", "mlp"),
            "metadata `vmix.projection`: expected one of",
        ),
        (
            |p| p.set("vmix.value_weights", "-"),
            "metadata `vmix.value_weights`: expected one of",
        ),
        (
            |p| p.set("vmix.apply_to", "uncond"),
            "metadata `vmix.apply_to`: expected one of cond",
        ),
        (
            |p| p.set("vmix.ldm_names", "[]"),
            "metadata `vmix.ldm_names`: expected a JSON object",
        ),
        (
            |p| p.set("vmix.ldm_names", "{}"),
            "metadata `vmix.ldm_names`: expected the LDM name of `down_blocks.0",
        ),
        (
            |p| {
                let names = &p.metadata["vmix.ldm_names"];
                let names = names.replace("output_blocks.0.1", "input_blocks.1.1");
                p.set("vmix.ldm_names", &names);
            },
            "metadata `vmix.ldm_names`: expected a name of its own per layer, found `input_blocks.1.1.transformer_blocks",
        ),
        (
            |p| {
                let weight = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v_aes.weight";
                p.tensors.remove(weight);
            },
            "metadata `vmix.ldm_names`: expected the layers of this file, found `up_blocks.0",
        ),
        (
            |p| p.put("aes_emb", tensor(&[2, 2, 6], 0)),
            "tensor `aes_emb`: expected shape [3, 2, 6], found shape [2, 2, 6]",
        ),
        (
            |p| p.put("aes_emb", tensor(&[36], 0)),
            "tensor `aes_emb`: expected shape [3, 2, d], found shape [36]",
        ),
        (
            |p| p.put("aes_emb", tensor(&[3, 2, 0], 0)),
            "tensor `aes_emb`: expected a width above 0, found 0",
        ),
        (
            |p| p.put("projection.linear.weight", tensor(&[3, 5], 0)),
            "tensor `projection.linear.weight`: expected shape [5, 3], found shape [3, 5]",
        ),
        (
            |p| {
                p.put(
                    "projection.norm.bias",
                    Tensor::new([6], Data::F32(vec![f32::NAN; 6])),
                )
            },
            "tensor `projection.norm.bias`: expected finite values, found NaN",
        ),
        (
            |p| p.put("projection.gain", tensor(&[3], 0)),
            "tensor `projection.gain`: expected no such tensor, found one",
        ),
        (
            |p| {
                p.put(
                    "input_blocks.1.1.transformer_blocks.0.attn2.to_v_aes.weight",
                    tensor(&[8, 6], 0),
                )
            },
            "metadata `vmix.ldm_names`: expected the LDM name of `input_blocks.1.1",
        ),
        (
            |p| {
                let layer = "up_blocks.0.attentions.0.transformer_blocks.0.attn2";
                p.put(&format!("{layer}.to_v_aes.weight"), tensor(&[4, 7], 0));
            },
            "tensor `up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v_aes.weight`: \
             expected shape [4, 6], found shape [4, 7]",
        ),
    ];
    for (change, expected) in cases {
        let mut parts = small();
        change(&mut parts);
        let error = parts.adapter().unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("bytes: {expected}")),
            "{error}\nnot {expected}"
        );
    }
    for key in small()
        .metadata
        .keys()
        .filter(|key| key.starts_with("vmix."))
    {
        let mut parts = small();
        parts.metadata.remove(key);
        let error = parts.adapter().unwrap_err().to_string();
        let expected = format!("bytes: metadata `{key}`: expected ");
        assert!(
            error.starts_with(&expected) && error.ends_with("found no such key"),
            "{error}"
        );
    }
    for name in small()
        .tensors
        .keys()
        .filter(|name| !name.ends_with("to_v_aes.weight"))
    {
        let mut parts = small();
        parts.tensors.remove(name);
        let error = parts.adapter().unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("bytes: tensor `{name}`: expected ")),
            "{error}"
        );
    }
}

#[test]
fn value_weights_are_checked_when_they_are_used() {
    let mut parts = small();
    let layer = "up_blocks.0.attentions.0.transformer_blocks.0.attn2";
    let name = format!("{layer}.to_v_aes.weight");
    let mut weights = parts.tensors[&name].to_f32();
    weights[17] = f32::INFINITY;
    parts.put(&name, Tensor::new([4, 6], Data::F32(weights)));
    let adapter = parts.adapter().unwrap();
    let expected = format!("bytes: tensor `{name}`: expected finite values, found NaN or infinity");
    assert_eq!(adapter.validate().unwrap_err().to_string(), expected);
    let error = adapter
        .values(&Selection::All, ApplyTo::Both, DType::F32)
        .unwrap_err();
    assert_eq!(error.to_string(), expected);

    parts.put(&name, Tensor::new([4, 6], Data::F32(vec![1e6; 24])));
    let adapter = parts.adapter().unwrap();
    adapter
        .values(&Selection::All, ApplyTo::Both, DType::BF16)
        .unwrap();
    let error = adapter
        .values(&Selection::All, ApplyTo::Both, DType::F16)
        .unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("values that overflow float16 at these label weights"),
        "{error}"
    );
}

/// A few bytes must not be able to ask for all memory.
#[test]
fn sizes_are_checked_before_they_are_believed() {
    for width in [1usize << 30, usize::MAX] {
        let mut parts = small();
        parts.set("vmix.value_weights", "base");
        let dims = parts.metadata["vmix.ldm_names"].clone();
        let dims: std::collections::BTreeMap<String, String> = serde_json::from_str(&dims).unwrap();
        let dims: Vec<_> = dims
            .keys()
            .map(|name| format!("\"{name}\": {width}"))
            .collect();
        parts.set("vmix.inner_dims", &format!("{{{}}}", dims.join(", ")));
        parts
            .tensors
            .retain(|name, _| !name.ends_with("to_v_aes.weight"));
        let error = parts.adapter().unwrap_err().to_string();
        assert!(error.contains("at most 268435456 numbers"), "{error}");
    }
}

#[cfg(unix)]
#[test]
fn files_are_as_readable_as_any_other() {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().unwrap();
    let (ours, any) = (
        folder.path().join("ours.safetensors"),
        folder.path().join("any"),
    );
    small().adapter().unwrap().save(&ours).unwrap();
    std::fs::write(&any, "").unwrap();
    let mode = |path| std::fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&ours), mode(&any));
}

#[cfg(unix)]
#[test]
fn links_stay_links_and_devices_devices() {
    let folder = tempfile::tempdir().unwrap();
    let (link, target) = (folder.path().join("link"), folder.path().join("target"));
    std::fs::write(&target, "old").unwrap();
    std::os::unix::fs::symlink("target", &link).unwrap();
    small().adapter().unwrap().save(&link).unwrap();
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(std::fs::read(&target).unwrap(), small_bytes());
    for (path, words) in [("/dev/null", "not a regular file"), ("/", "is a directory")] {
        let saved = small().adapter().unwrap().save(path).unwrap_err();
        let opened = Adapter::open(path).unwrap_err();
        for error in [saved, opened] {
            assert_eq!(error.to_string(), format!("{path}: {words}"));
        }
    }
    // The message names what was asked for, not the temporary file.
    let absent = folder.path().join("absent/file");
    let error = small().adapter().unwrap().save(&absent).unwrap_err();
    let words = format!("{}: {}", absent.display(), std::io::ErrorKind::NotFound);
    assert_eq!(error.to_string(), words);
}

/// A file can hold anything, a message cannot.
#[test]
fn messages_are_short_and_say_nothing_to_the_terminal() {
    let mut parts = small();
    parts.set(
        "vmix.base",
        &format!("\x1b[31m\u{202e}{}", "x".repeat(10_000)),
    );
    let error = parts.adapter().unwrap_err().to_string();
    assert!(error.contains(r"found `\u{1b}[31m\u{202e}xxx"), "{error}");
    assert!(error.ends_with('…') && error.len() < 600, "{error}");
}

/// What the safetensors crate leaves out: which tensor, how many bytes.
#[test]
fn damaged_files_are_described_in_numbers() {
    let good = small_bytes();
    let cut = Adapter::from_bytes(good[..good.len() - 8].to_vec()).unwrap_err();
    let words = format!("({} bytes expected, {} found)", good.len(), good.len() - 8);
    assert!(cut.to_string().ends_with(&words), "{cut}");
    let short = Adapter::from_bytes(good[..100].to_vec()).unwrap_err();
    assert!(
        short.to_string().ends_with(", the file has 100)"),
        "{short}"
    );
    let shape = replace_in_header(&good, "[3,2,6]", "[3,2,7]");
    let shape = Adapter::from_bytes(shape).unwrap_err().to_string();
    assert!(shape.ends_with("(tensor `aes_emb`, whose offsets do not fit its shape and dtype)"));
}

#[test]
fn presets_are_checked_too() {
    let adapter = small().adapter().unwrap();
    let values = adapter
        .values(&Selection::All, ApplyTo::Both, DType::F32)
        .unwrap();
    let good = values.to_bytes().unwrap();
    Values::from_bytes(good.clone()).unwrap();
    for (from, to, expected) in [
        (
            "\"vmix.kind\":\"preset\"",
            "\"vmix.kind\":\"PRESET\"",
            "metadata `vmix.kind`",
        ),
        (
            "\"vmix.origin\":\"",
            "\"vmix.origin\":\"x",
            "metadata `vmix.origin`",
        ),
        (
            r#"\"sharp focus\":1.0,"#,
            r#"\"sharp fucus\":1.0,"#,
            "metadata `vmix.selection`",
        ),
        (
            r#"\"sharp focus\":1.0,"#,
            r#"\"sharp focus\":1e9,"#,
            "metadata `vmix.selection`",
        ),
        (
            r#"\"vibrant color\":1.0"#,
            r#"\"vibrant color\":\"x\""#,
            "metadata `vmix.selection`",
        ),
        ("attn2.v_aes\"", "attn2.v_AES\"", "tensor `down_blocks.0"),
        ("[5,8]", "[8,5]", "tensor `down_blocks.0"),
        ("\"both\"", "\"contrast\"", "tensor `down_blocks.0"),
    ] {
        let error = Values::from_bytes(replace_in_header(&good, from, to));
        match error {
            // 1e9 is a weight like any other.
            Ok(values) => assert_eq!(values.weights()[2], 1e9, "{from} -> {to}"),
            Err(error) => assert!(error.to_string().contains(expected), "{to}: {error}"),
        }
    }
}

/// The file with every `from` in its header replaced, and the length of the header mended.
fn replace_in_header(file: &[u8], from: &str, to: &str) -> Vec<u8> {
    let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&file[8..8 + len]).unwrap();
    assert!(header.contains(from), "{from} is not in {header}");
    let header = header.replace(from, to);
    [
        &(header.len() as u64).to_le_bytes(),
        header.as_bytes(),
        &file[8 + len..],
    ]
    .concat()
}

#[test]
fn headers_that_lie_are_refused() {
    let good = small_bytes();
    for (what, bytes) in [
        ("empty", vec![]),
        ("too short for a length", good[..7].to_vec()),
        (
            "a length beyond the file",
            [&u64::MAX.to_le_bytes(), &good[8..]].concat(),
        ),
        ("no JSON", [&4u64.to_le_bytes()[..], b"{{{{"].concat()),
        ("no UTF-8", [&4u64.to_le_bytes()[..], &[0xff; 4]].concat()),
        ("cut off", good[..good.len() - 1].to_vec()),
        ("followed by more", [&good[..], &[0]].concat()),
        (
            "offsets overlap",
            replace_in_header(&good, "\"data_offsets\":[0,", "\"data_offsets\":[4,"),
        ),
        (
            "shapes overflow",
            replace_in_header(
                &good,
                "[3,2,6]",
                "[4611686018427387904,4611686018427387904,16]",
            ),
        ),
        (
            "dtype unknown",
            replace_in_header(&good, "\"dtype\":\"F32\"", "\"dtype\":\"F33\""),
        ),
    ] {
        let error = Adapter::from_bytes(bytes).unwrap_err().to_string();
        assert!(
            error.starts_with("bytes: not a safetensors file: "),
            "{what}: {error}"
        );
    }
    let integers = replace_in_header(&good, "\"dtype\":\"F32\"", "\"dtype\":\"I32\"");
    let error = Adapter::from_bytes(integers).unwrap_err().to_string();
    assert_eq!(
        error,
        "bytes: tensor `aes_emb`: expected F32, F16 or BF16, found I32"
    );
}

proptest! {
    /// Whatever a byte becomes, the answer is an adapter or an error, never a panic.
    #[test]
    fn damaged_files_never_panic(position in 0..4000usize, byte: u8) {
        let mut bytes = small_bytes();
        let position = position % bytes.len();
        bytes[position] = byte;
        if let Ok(adapter) = Adapter::from_bytes(bytes) {
            let _ = adapter.values(&Selection::All, ApplyTo::Contrast, DType::F16);
        }
    }

    #[test]
    fn cut_files_are_refused(len in 0..4000usize) {
        let bytes = small_bytes();
        prop_assert!(Adapter::from_bytes(bytes[..len % bytes.len()].to_vec()).is_err());
    }
}

/// A file of SDXL's size, in which everything but the header is a hole: opening it must leave the
/// value weights, 95 % of the file, where they are.
#[cfg(target_os = "linux")]
#[test]
fn opening_reads_only_the_header_and_the_small_tensors() {
    use std::io::Write;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sdxl.safetensors");
    let whole = folder.path().join("whole.safetensors");
    zeros(Base::Sdxl).adapter().unwrap().save(&whole).unwrap();
    let bytes = std::fs::read(&whole).unwrap();
    let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(&bytes[..header_end]).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    assert!(bytes.len() > 330_000_000, "{}", bytes.len());
    drop((bytes, file));

    let adapter = Adapter::open(&path).unwrap();
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mapping = smaps
        .split("sdxl.safetensors")
        .nth(1)
        .expect("the file is mapped");
    let resident = mapping
        .lines()
        .find_map(|line| line.strip_prefix("Rss:"))
        .unwrap();
    let resident: usize = resident.trim().trim_end_matches(" kB").parse().unwrap();
    // AesEmb and the projection are 8.4 MB in f16, nearly all of it Z. Where a file system has huge
    // pages, each end of what is read brings one of 2 MB.
    assert!(resident < 20_000, "{resident} kB are resident");
    adapter
        .values(&Selection::All, ApplyTo::Both, DType::F16)
        .unwrap();
}

//! Files: round trips, and what is refused with which words.

use crate::parts::{Parts, linear, small, tensor, zeros};
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
    assert_eq!(opened.metadata(), made.metadata());
    let mut given = small().metadata;
    given.extend(
        ["vmix.format", "vmix.kind", "vmix.rows", "vmix.coefficients"]
            .map(|key| (key.to_owned(), made.metadata()[key].clone())),
    );
    assert_eq!(made.metadata(), &given);
    assert_eq!(&opened.layers()[..], &made.layers()[..]);
    assert_eq!(
        opened.layers()[0].name,
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    );
    assert_eq!(
        (opened.context_tokens(), opened.context_dim()),
        (5, Some(6))
    );
    // Equal content, equal bytes: hashes of files mean something.
    assert_eq!(std::fs::read(&path).unwrap(), small_bytes());
    // The file is not needed any more.
    let file = std::fs::OpenOptions::new().write(true).open(&path);
    file.unwrap().set_len(100).unwrap();
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
        assert_eq!(adapter.context_dim(), base.context_dim());
        let last = format!("{}.rows", layers.last().unwrap().name);
        let width = layers.last().unwrap().inner_dim;
        let refused = |change: &dyn Fn(&mut Parts)| {
            let mut parts = Parts {
                tensors: adapter.tensors().unwrap(),
                metadata: adapter.metadata().clone(),
            };
            change(&mut parts);
            parts.opened().unwrap_err().to_string()
        };
        assert_eq!(
            refused(&|parts| drop(parts.tensors.remove(&last))),
            format!("tensors: tensor `{last}`: expected shape [7, {width}], found no such tensor")
        );
        let extra = "down_blocks.9.attentions.0.transformer_blocks.0.attn2.rows";
        assert_eq!(
            refused(&|parts| parts.put(extra, tensor(&[7, 2], 0))),
            format!("tensors: tensor `{extra}`: expected no such tensor, found one")
        );
        assert_eq!(
            refused(&|parts| parts.put(&last, tensor(&[7, 2], 0))),
            format!("tensors: tensor `{last}`: expected shape [7, {width}], found shape [7, 2]")
        );
        let d = base.context_dim().unwrap();
        assert_eq!(
            refused(&|parts| parts.put("aes_emb", tensor(&[3, 2, 5], 0))),
            format!(
                "tensors: tensor `aes_emb`: expected width {d}, as in every {base} U-Net, found 5"
            )
        );
    }
}

/// Every way in which a file can be wrong: what is changed, and how the message must start.
#[test]
fn wrong_files_are_refused_by_name() {
    type Change = fn(&mut Parts);
    const UP: &str = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.rows";
    let cases: &[(Change, &str)] = &[
        (
            |p| p.set("vmix.format", "1"),
            "metadata `vmix.format`: expected `2`, as in every VMix file, found `1`",
        ),
        (
            |p| p.set("vmix.kind", "lora"),
            "metadata `vmix.kind`: expected one of adapter, preset, init, found `lora`",
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
            |p| p.set("vmix.norm_eps", "0"),
            "metadata `vmix.norm_eps`: expected a number above 0",
        ),
        (
            |p| p.set("vmix.coefficients", "mlp"),
            "metadata `vmix.coefficients`: expected one of layernorm, linear, found `mlp`",
        ),
        (
            |p| p.set("vmix.coefficients", "linear"),
            "metadata `vmix.rows`: expected a JSON list with `side` and `label` of every row, \
             found a constant row in a linear file",
        ),
        (
            |p| p.set("vmix.apply_to", "uncond"),
            "metadata `vmix.apply_to`: expected one of cond",
        ),
        (
            |p| p.set("vmix.made", r#"{"method": "guessed"}"#),
            "metadata `vmix.made`: expected a `method` among trained, fitted, merged, found `guessed`",
        ),
        (
            |p| p.set("vmix.made", r#"{"method": "trained", "method": "fitted"}"#),
            "metadata `vmix.made`: expected a JSON object with the key `method`, found `method` comes \
             twice",
        ),
        (
            |p| p.set("vmix.rows", r#"[{"label": "sharp focus", "side": "up"}]"#),
            "metadata `vmix.rows`: expected sides among positive, negative, constant, found `up`",
        ),
        (
            |p| p.set("vmix.rows", r#"[{"side": "positive"}]"#),
            "metadata `vmix.rows`: expected a JSON list with `side` and `label` of every row, found a \
             positive row without a label",
        ),
        (
            |p| p.set("vmix.rows", r#"[{"label": "blur", "side": "positive"}]"#),
            "metadata `vmix.rows`: expected a JSON list with `side` and `label` of every row, found the \
             label `blur`, which is not in vmix.labels",
        ),
        (
            |p| {
                p.set(
                    "vmix.rows",
                    r#"[{"label": "sharp focus", "side": "positive"}]"#,
                )
            },
            "metadata `vmix.rows`: expected a JSON list with `side` and `label` of every row, found no \
             row of label `vibrant color`",
        ),
        (
            |p| p.set("vmix.ldm_names", "[]"),
            "metadata `vmix.ldm_names`: expected a JSON object",
        ),
        (
            |p| p.set("vmix.ldm_names", "{}"),
            "metadata `vmix.ldm_names`: expected at least one layer, found none",
        ),
        (
            |p| {
                let names = &p.metadata["vmix.ldm_names"];
                let names = names.replace("output_blocks.0.1", "input_blocks.1.1");
                p.set("vmix.ldm_names", &names);
            },
            "metadata `vmix.ldm_names`: expected a name of its own per layer, found \
             `input_blocks.1.1.transformer_blocks",
        ),
        (
            |p| drop(p.tensors.remove(UP)),
            "tensor `up_blocks.0.attentions.0.transformer_blocks.0.attn2.rows`: expected a tensor, \
             found no such tensor",
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
            |p| p.put("context.rows", tensor(&[7, 5], 0)),
            "tensor `context.rows`: expected shape [7, 6], found shape [7, 5]",
        ),
        (
            |p| p.put("profile", tensor(&[7, 5], 0)),
            "tensor `profile`: expected shape [5, 7], found shape [7, 5]",
        ),
        (
            |p| {
                let profile = vec![half::f16::ONE; 35];
                p.put("profile", Tensor::new([5, 7], Data::F16(profile)));
            },
            "tensor `profile`: expected F32, found F16",
        ),
        (
            |p| p.put("gram_factor", tensor(&[5, 6], 0)),
            "tensor `gram_factor`: expected shape [6, 6], found shape [5, 6]",
        ),
        (
            |p| p.put("gram_factor", tensor(&[6, 0], 0)),
            "tensor `gram_factor`: expected shape [6, m], found shape [6, 0]",
        ),
        (
            |p| {
                let mut factor = p.tensors["gram_factor"].to_f32();
                factor[7] = f32::NAN;
                let shape = p.tensors["gram_factor"].shape().to_vec();
                p.put("gram_factor", Tensor::new(shape, Data::F32(factor)));
            },
            "tensor `gram_factor`: expected finite values, found NaN",
        ),
        (
            |p| p.put("attention", tensor(&[5, 5], 0)),
            "tensor `attention`: expected entries that are not negative",
        ),
        (
            |p| p.put("attention", Tensor::new([5, 5], Data::F32(vec![0.5; 25]))),
            "tensor `attention`: expected entries that add up to 1, found the sum 12.5",
        ),
        (
            |p| p.put("projection.gain", tensor(&[3], 0)),
            "tensor `projection.gain`: expected no such tensor, found one",
        ),
        (
            |p| {
                p.put(
                    "input_blocks.1.1.transformer_blocks.0.attn2.rows",
                    tensor(&[7, 8], 0),
                )
            },
            "tensor `input_blocks.1.1.transformer_blocks.0.attn2.rows`: expected no such tensor",
        ),
        (
            |p| p.put(UP, tensor(&[4, 4], 0)),
            "tensor `up_blocks.0.attentions.0.transformer_blocks.0.attn2.rows`: expected shape [7, 4], \
             found shape [4, 4]",
        ),
        (
            |p| {
                let rows = Tensor::new([7, 4], Data::F16(vec![half::f16::ONE; 28]));
                p.put(UP, rows);
            },
            "tensor `up_blocks.0.attentions.0.transformer_blocks.0.attn2.rows`: expected float32, as \
             the other tensors, found float16",
        ),
        (
            |p| p.put(UP, Tensor::new([7, 4], Data::F32(vec![f32::INFINITY; 28]))),
            "tensor `up_blocks.0.attentions.0.transformer_blocks.0.attn2.rows`: expected finite values",
        ),
    ];
    for (change, expected) in cases {
        let mut parts = small().file();
        change(&mut parts);
        let error = parts.opened().unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("tensors: {expected}")),
            "{error}\nnot {expected}"
        );
    }
    let mut parts = linear();
    let labels = parts.metadata["vmix.labels"].replacen(r#""neutral": 0"#, r#""neutral": 1"#, 1);
    parts.set("vmix.labels", &labels);
    assert_eq!(
        parts.opened().unwrap_err().to_string(),
        "tensors: metadata `vmix.labels`: expected `neutral` 0 in a linear file, found 1 for label \
         `vibrant color`"
    );
    let file = small().file();
    for key in file.metadata.keys().filter(|key| key.starts_with("vmix.")) {
        let mut parts = small().file();
        parts.metadata.remove(key);
        let error = parts.opened().unwrap_err().to_string();
        let expected = format!("tensors: metadata `{key}`: expected ");
        assert!(
            error.starts_with(&expected) && error.ends_with("found no such key"),
            "{error}"
        );
    }
    for name in file.tensors.keys() {
        let mut parts = small().file();
        parts.tensors.remove(name);
        let error = parts.opened().unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("tensors: tensor `{name}`: expected ")),
            "{error}"
        );
    }
}

/// The matrices that an adapter is made from are checked as files are.
#[test]
fn wrong_matrices_are_refused_by_name() {
    type Change = fn(&mut Parts);
    const WEIGHT: &str = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v_aes.weight";
    let cases: &[(Change, &str)] = &[
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
            |p| p.put("projection.linear.bias", tensor(&[6], 0)),
            "tensor `projection.linear.bias`: expected shape [5], found shape [6]",
        ),
        (
            |p| p.put(WEIGHT, tensor(&[4, 7], 0)),
            "tensor `up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v_aes.weight`: expected \
             shape [4, 6], found shape [4, 7]",
        ),
        (
            |p| p.put("gram_factor", tensor(&[6, 6], 0)),
            "tensor `gram_factor`: expected no such tensor, found one",
        ),
        (
            |p| p.put("aes_emb", tensor(&[3, 2, 0], 0)),
            "tensor `aes_emb`: expected shape [3, 2, d], found shape [3, 2, 0]",
        ),
    ];
    for (change, expected) in cases {
        let mut parts = small();
        change(&mut parts);
        let error = parts.adapter().unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("matrices: {expected}")),
            "{error}\nnot {expected}"
        );
    }
    for name in small().tensors.keys() {
        let mut parts = small();
        parts.tensors.remove(name);
        let error = parts.adapter().unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("matrices: tensor `{name}`: expected ")),
            "{error}"
        );
    }
    // Finite matrices whose product is not.
    let mut parts = small();
    parts.put(WEIGHT, Tensor::new([4, 6], Data::F32(vec![f32::MAX; 24])));
    assert_eq!(
        parts.adapter().unwrap_err().to_string(),
        "layer `up_blocks.0.attentions.0.transformer_blocks.0.attn2`: expected rows that float32 can \
         hold, found more"
    );
}

#[test]
fn values_beyond_a_dtype_name_layer_and_label() {
    let adapter = small().adapter().unwrap();
    let selection = Selection::weights([("vibrant color", 1e38), ("sharp focus", -2.0)]);
    adapter
        .values(&selection, ApplyTo::Both, DType::F16)
        .unwrap(); // the LayerNorm takes it back
    let adapter = linear().opened().unwrap();
    let values = |dtype| adapter.values(&selection, ApplyTo::Both, dtype);
    values(DType::BF16).unwrap();
    assert_eq!(
        values(DType::F16).unwrap_err().to_string(),
        "layer `down_blocks.0.attentions.0.transformer_blocks.0.attn2`: expected values that float16 \
         can hold, found more: label `vibrant color` at weight 100000000000000000000000000000000000000"
    );
}

/// A few bytes must not be able to ask for all memory.
#[test]
fn sizes_are_checked_before_they_are_believed() {
    // 4096 tokens of rows that are 65,536 wide: 2²⁸ numbers and more, from 2 MB.
    let mut parts = small().file();
    parts.set("vmix.context_tokens", "4096");
    parts.put("profile", tensor(&[4096, 7], 0));
    let layer = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.rows";
    parts.put(layer, tensor(&[7, 1 << 16], 0));
    let error = parts.opened().unwrap_err().to_string();
    assert!(error.contains("at most 268435456 numbers"), "{error}");
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
        "bytes: tensor `down_blocks.0.attentions.0.transformer_blocks.0.attn2.rows`: expected F32, F16 or \
         BF16, found I32"
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

/// A base model of gigabytes that somebody takes for an adapter is refused by its header.
#[cfg(unix)]
#[test]
fn what_is_no_vmix_file_is_not_read() {
    use std::io::Write;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let size: u64 = 1 << 40; // a hole: nothing could read it whole
    let header = format!(
        r#"{{"model.weight":{{"dtype":"F16","shape":[{}],"data_offsets":[0,{size}]}}}}"#,
        size / 2
    );
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + size)
        .expect("a file system with sparse files");
    for error in [
        vmix::open(&path).unwrap_err(),
        Adapter::open(&path).unwrap_err(),
    ] {
        let expected =
            "metadata `vmix.format`: expected `2`, as in every VMix file, found no such key";
        assert!(error.to_string().ends_with(expected), "{error}");
    }
}

"""The patch in any hands: state goes with the data, copies are patched, nothing is ignored in silence."""

import copy
import functools
import gc
import pickle
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES
from tiny import IMAGE_ID, MIXED_ROWS, PATCHES, batch, images, left_pad, prompt, tiny_llava

import apet
from apet import ApetConfig
from apet.adapters import host
from apet.adapters.hooks import InFlight
from apet.methods import get_method

VISION = ApetConfig(visual_token_num=9, basis_token_num=3)
TOWER = ApetConfig(visual_token_num=9, method="visionzip")
BOTH = ApetConfig(visual_token_num=14, layer_list=[2], image_token_list=[6], basis_token_num=3)
GREEDY = {"max_new_tokens": 5, "do_sample": False}
takes_encoded = pytest.mark.skipif(
    "mm_encoder_outputs" not in host.argument_names(type(tiny_llava()).forward),
    reason="this transformers takes no encoder outputs instead of pixels",
)


@pytest.fixture
def model():
    return tiny_llava()


def one(seed: int = 0) -> dict:
    """A prompt with one image."""
    return left_pad([prompt(9, (3,), seed)]) | {"pixel_values": images(1, seed)}


@pytest.mark.host
class TestStateGoesWithTheData:
    @takes_encoded
    @pytest.mark.parametrize("config", [VISION, BOTH], ids=["vision", "both"])
    def test_an_earlier_encoding_is_answered_as_itself(self, model, config):
        first, second = one(1), one(2)
        with torch.inference_mode(), apet.patched(model, config):
            wanted = model(**first)
            encoded = [
                model.model.get_image_features(given["pixel_values"], return_dict=True) for given in (first, second)
            ]
            ids = {name: first[name] for name in ("input_ids", "attention_mask")}
            found = model(**ids, mm_encoder_outputs={"image": encoded[0]})
        assert torch.equal(found.logits, wanted.logits)
        assert found.apet.origin()[0][0].tolist() == wanted.apet.origin()[0][0].tolist()

    @takes_encoded
    def test_what_was_encoded_otherwise_is_refused(self, model):
        given = one()
        plain = model.model.get_image_features(given["pixel_values"], return_dict=True)
        ids = given["input_ids"]
        with torch.inference_mode(), apet.patched(model, VISION):
            with pytest.raises(ValueError, match="did not encode"):
                model(input_ids=ids, mm_encoder_outputs={"image": plain})
            ours = model.model.get_image_features(given["pixel_values"], return_dict=True)
        with (
            torch.inference_mode(),
            apet.patched(model, BOTH),
            pytest.raises(ValueError, match="another configuration"),
        ):
            model(input_ids=ids, mm_encoder_outputs={"image": ours})

    def test_placeholders_without_pixels_are_not_the_pictures_of_before(self, model):
        with torch.inference_mode(), apet.patched(model, VISION):
            model(**one())
            with pytest.raises(ValueError, match="did not encode"):
                model(input_ids=one(1)["input_ids"])

    def test_every_prefill_carries_its_own_result(self, model):
        with torch.inference_mode(), apet.patched(model, BOTH):
            outputs = [model(**one(seed)) for seed in range(3)]
            step = model(input_ids=torch.tensor([[5]]), **host.with_cache(host.cache_of(outputs[0])))
            last = apet.last_result(model)
            base = model.model(**one(1))
        kept = [output.apet.origin()[0][0].tolist() for output in outputs]
        assert kept[0] != kept[1] and kept[2] == last.origin()[0][0].tolist()
        assert base.apet.origin()[0][0].tolist() == kept[1]
        assert not hasattr(step, "apet")

    @pytest.mark.parametrize("place", ["layer", "tower", "projector"])
    def test_a_forward_inside_a_forward(self, model, place):
        """As a reward model, or a hook that looks, would do."""
        inner = model.model
        module = {
            "layer": inner.language_model.layers[1],
            "tower": inner.vision_tower,
            "projector": inner.multi_modal_projector,
        }[place]
        with torch.inference_mode(), apet.patched(model, BOTH):
            wanted, busy, seen = [model(**one(seed)).logits for seed in (1, 2)], [], []

            def look(*_):
                if not busy:
                    busy.append(True)
                    seen.append(model(**one(2)).logits)
                    busy.clear()

            handle = module.register_forward_pre_hook(look)
            outer = model(**one(1))
            handle.remove()
        assert torch.equal(outer.logits, wanted[0]) and all(torch.equal(found, wanted[1]) for found in seen) and seen

    def test_equal_things_in_flight_end_one_by_one(self):
        flight = InFlight()
        with flight.during(2):
            with flight.during(2):
                pass
            assert flight.top == 2
        assert flight.top is None

    def test_an_exception_leaves_nothing_in_flight(self, model):
        def fail(*_):
            raise KeyboardInterrupt

        with torch.inference_mode(), apet.patched(model, BOTH):
            wanted = model(**one()).logits
            for module in (model.model, model.model.vision_tower, model.model.language_model.layers[2]):
                handle = module.register_forward_pre_hook(fail, prepend=True)
                with pytest.raises(KeyboardInterrupt):
                    model(**one(1))
                handle.remove()
                assert model._apet_patch.prompt.forwards.top is None
            assert torch.equal(model(**one()).logits, wanted)

    def test_nothing_of_a_picture_stays_alive(self, model):
        pixels = images(1)
        alive = []
        with torch.inference_mode(), apet.patched(model, TOWER):
            hook = lambda module, args: alive.append(weakref.ref(args[0]))  # noqa: E731
            handles = [layer.register_forward_pre_hook(hook) for layer in model.model.vision_tower.encoder.layers]
            handles.append(model.model.multi_modal_projector.register_forward_pre_hook(hook))
            model.generate(**one() | {"pixel_values": pixels}, **GREEDY)
            for handle in handles:
                handle.remove()
        gc.collect()
        assert len(alive) >= 3 and all(one() is None for one in alive)

    def test_results_of_a_projector_with_gradients(self, model):
        with apet.patched(model, ApetConfig(visual_token_num=9, method="apet_plus", size_bias=True)):
            model(**one())
            result = apet.last_result(model)
            assert result.layer_averaged_tokens == [9] and result.origin()[0][0].numpy().shape == (9,)


class TestThreads:
    @pytest.fixture(autouse=True)
    def one_core_each(self):
        # Eight threads with a pool of their own each would wait for one another.
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

    @pytest.mark.parametrize(("config", "turns"), [(BOTH, 50), (TOWER, 10)], ids=["apet", "tower"])
    def test_eight_threads_answer_as_one(self, model, config, turns):
        prompts = [one(seed) for seed in range(10)]
        results, errors = {}, []
        with apet.patched(model, config):
            wanted = []
            for given in prompts:
                answer = model.generate(**given, **GREEDY).tolist()
                wanted.append((answer, apet.last_result(model).origin()[0][0].tolist()))

            def work(number):
                try:
                    for turn in range(turns):
                        index = (number + turn) % len(prompts)
                        answer = model.generate(**prompts[index], **GREEDY).tolist()
                        kept = apet.last_result(model).origin()[0][0].tolist()
                        results[number, turn] = (answer, kept) == wanted[index]
                except Exception as error:  # a thread's exception would be lost
                    errors.append(error)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert errors == [] and len(results) == 8 * turns and all(results.values())

    def test_a_thread_that_has_not_run_has_no_result(self, model):
        found = []

        def ask():
            with pytest.raises(RuntimeError, match="in this thread"):
                apet.last_result(model)
            found.append(True)

        with apet.patched(model, VISION):
            model(**one())
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
        assert found == [True]


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model, path):
    torch.save(model, path)
    return torch.load(path, weights_only=False)


def ours(model) -> list:
    """Hooks and attributes of the patch."""
    found = []
    for module in model.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values(), *vars(module).values()]
        found += [one for one in hooks if type(one).__module__.startswith("apet.")]
        found += [one for one in hooks if getattr(one, "__module__", "").startswith("apet.")]
        found += [one for one in hooks if getattr(getattr(one, "func", None), "__module__", "").startswith("apet.")]
    return found


@pytest.mark.host
class TestCopies:
    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch"])
    @pytest.mark.parametrize(
        "config",
        [BOTH, ApetConfig(visual_token_num=9, method="visionzip", size_bias=True), ApetConfig()],
        ids=["both", "tower", "empty"],
    )
    def test_a_copy_is_patched_alike_and_apart(self, model, tmp_path, way, config):
        untouched = tiny_llava()(**one()).logits
        ways = {
            "deepcopy": copy.deepcopy,
            "pickle": through_pickle,
            "torch": lambda m: through_torch(m, tmp_path / "m"),
        }
        apet.apply_patch(model, config)
        # Before the first call: transformers' own hooks for hidden states, put on then, cannot be pickled.
        twin = ways[way](model)
        wanted = model(**one())
        assert apet.active_config(twin) == config
        with pytest.raises(RuntimeError, match="not run"):
            apet.last_result(twin)
        tokens = apet.last_result(model).layer_averaged_tokens
        apet.remove_patch(model)
        assert torch.equal(model(**one()).logits, untouched)
        assert torch.equal(twin(**one()).logits, wanted.logits)
        assert apet.last_result(twin).layer_averaged_tokens == tokens
        later = copy.deepcopy(twin)
        assert torch.equal(later(**one()).logits, wanted.logits)
        for one_of_them in (twin, later):
            apet.remove_patch(one_of_them)
            assert torch.equal(one_of_them(**one()).logits, untouched)
            assert not ours(one_of_them)

    @pytest.mark.parametrize("name", list(FAMILIES))
    def test_of_every_family(self, name):
        family = FAMILIES[name]
        model = family.build("sdpa")
        inputs = family.inputs(family.prompts[:2])
        with torch.inference_mode():
            apet.apply_patch(model, apet.preset_config(model))
            twin = through_pickle(model)
            assert torch.equal(twin(**inputs).logits, model(**inputs).logits)

    @pytest.mark.parametrize("path", ["", "model.vision_tower", "model.vision_tower.encoder.layers.0", "model"])
    def test_what_the_user_had_set_comes_back(self, model, path):
        module = model.get_submodule(path)
        name = {"": "generate", "model": "get_image_features"}.get(path, "forward")
        original, calls = getattr(module, name), []

        @functools.wraps(original)
        def own(*args, **kwargs):
            calls.append(True)
            return original(*args, **kwargs)

        setattr(module, name, own)
        with apet.patched(model, TOWER):
            assert ours(model)
            model.generate(**one(), **GREEDY)
            assert calls
        assert vars(module)[name] is own

    def test_a_wrapper_put_on_afterwards_stays_and_works(self, model):
        untouched = model.generate(**one(), **GREEDY)
        apet.apply_patch(model, VISION)
        layer = model.model.vision_tower.encoder.layers[0]
        inner = layer.forward
        layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
        apet.remove_patch(model)
        assert torch.equal(model.generate(**one(), **GREEDY), untouched)


@pytest.mark.host
class TestWrappers:
    @pytest.mark.slow
    @pytest.mark.parametrize("way", ["wrapper", "method"])
    def test_a_model_that_was_compiled_and_called_before(self, way):
        torch._dynamo.reset()
        model = tiny_llava(layers=1, depth=2)
        untouched = model(**one()).logits
        compiled = torch.compile(model, backend="eager") if way == "wrapper" else model
        if way == "method":
            model.compile(backend="eager")
        with torch.no_grad():
            assert host.cache_of(compiled(**one())).get_seq_length() == 9 + PATCHES
            apet.apply_patch(compiled, VISION)
            assert host.cache_of(compiled(**one())).get_seq_length() == 9 + 9
            assert apet.last_result(compiled).layer_averaged_tokens == [9]
            apet.remove_patch(compiled)
            output = compiled(**one())
        assert host.cache_of(output).get_seq_length() == 9 + PATCHES
        assert torch.equal(output.logits, untouched)

    def test_wrappers_that_leave_no_doubt(self, model):
        class Peft(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.base_model = model

            def get_base_model(self):
                return self.base_model

        for wrapper in (torch.compile(model, backend="eager"), Peft(), SimpleNamespace(model=model)):
            assert apet.apply_patch(wrapper, VISION) is wrapper
            assert apet.active_config(wrapper) == apet.active_config(model) == VISION
            assert apet.remove_patch(wrapper) is wrapper and apet.active_config(model) is None

    def test_parts_and_other_wrappers_are_told_what_to_pass(self, model):
        with pytest.raises(TypeError, match="pass the whole model"):
            apet.apply_patch(model.model, VISION)
        with pytest.raises(TypeError, match=r"pass its \.module"):
            apet.apply_patch(torch.nn.DataParallel(model), VISION)

    def test_continuous_batching_is_refused(self, model):
        with apet.patched(model, VISION):
            for name in host.CONTINUOUS:
                with pytest.raises(ValueError, match="continuous batching"):
                    getattr(model, name)([[1, 2, 3]])
        assert not set(host.CONTINUOUS) & set(vars(model))


class TestConfiguration:
    @pytest.mark.parametrize(
        ("fields", "kept"),
        [
            ({"image_token_ratio": 1}, [25]),
            ({"image_token_ratio": 1.0}, [25]),
            ({"visual_token_num": np.int64(9)}, [9]),
            ({"visual_token_num": np.array([9])}, [9]),
            ({"image_token_ratio": np.float32(0.5)}, [12]),
            ({"layer_list": [2], "image_token_ratio_list": [1]}, [25]),
            ({"layer_list": np.array([2]), "image_token_list": [np.int32(5)]}, [15]),
        ],
    )
    def test_numbers_mean_what_they_say(self, model, fields, kept):
        with apet.patched(model, ApetConfig.from_dict(fields | {"basis_token_num": 3})):
            model(**one())
            assert apet.last_result(model).layer_averaged_tokens == kept

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"visual_token_num": 9, "method": "random", "basis_selection": "dpc"},
                "basis_selection='dpc' has no effect",
            ),
            ({"visual_token_num": 9, "basis_selection": "dpc", "fps_start": 3}, "fps_start=3 has no effect"),
            ({"method": "apet_plus", "method_options": {"error_target": 0.1}}, "error_target=0.1: no effect without a"),
            ({"visual_token_num": 9, "seed": "x"}, "seed='x' must be an int"),
            (
                {"visual_token_num": 9, "method": "apet_plus", "method_options": {"quota": "a"}},
                "quota='a'.*must be float",
            ),
            ({"visual_token_num": 9, "fps_start": 25}, "start=25 is not one of the 25 tokens"),
        ],
    )
    def test_what_has_no_effect_or_no_sense_is_refused_when_it_is_applied(self, model, fields, message):
        with pytest.raises(ValueError, match=message):
            apet.apply_patch(model, ApetConfig.from_dict(fields))
        assert apet.active_config(model) is None

    def test_option_types(self):
        assert get_method("apet_plus", quota=0, rounds=2).quota == 0
        with pytest.raises(ValueError, match="rounds='2' of method 'apet_plus' must be int"):
            get_method("apet_plus", rounds="2")

    def test_budgets_for_other_pictures_are_noticed_before_the_tower_runs(self, model):
        with apet.patched(model, ApetConfig(visual_token_num=[9, 9, 9])):
            handle = model.model.vision_tower.register_forward_pre_hook(lambda *_: pytest.fail("the tower ran"))
            with pytest.raises(ValueError, match="3 budgets"):
                model(**one())
            handle.remove()


@pytest.mark.host
class TestNothingToCompress:
    """A configuration without budgets changes nothing, whatever is done with the model; it only counts."""

    def test_what_a_compressing_patch_refuses_works(self, model):
        text, ids = torch.tensor([[5, 6, 7]]), one()["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        calls = [
            lambda: model(input_ids=ids).logits,
            lambda: model(inputs_embeds=embeds).logits,
            lambda: model(**one(), labels=ids).loss,
            lambda: model(input_ids=text, attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()).logits,
        ]
        untouched = [call() for call in calls]
        with apet.patched(model, ApetConfig()):
            assert all(map(torch.equal, untouched, [call() for call in calls]))
            model.train()
            model(**one(), labels=ids).loss.backward()
            model.eval()

    def test_only_one_hook_is_there_and_it_counts(self, model):
        with apet.patched(model, ApetConfig()):
            hooks = [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
            assert hooks == [model.model]
            model.generate(**batch(MIXED_ROWS), **GREEDY)
            assert apet.last_result(model).layer_averaged_tokens == [25, 25, 50, 0, 50]
            assert apet.last_result(model).stages == ()

    def test_ids_that_hold_a_placeholder_by_chance(self, model):
        ids = torch.tensor([[IMAGE_ID, 5, IMAGE_ID, 6]])
        untouched = model.generate(input_ids=ids, **GREEDY)
        with apet.patched(model, ApetConfig()):
            assert torch.equal(model.generate(input_ids=ids, **GREEDY), untouched)
